"""VTAB-1K: check and prepare the data, run the protocol, summarise its results.

python tools/vtab.py check data/vtab-1k
python tools/vtab.py smoke
python tools/vtab.py run --config configs/vtab/vil-tiny_vtab1k.py --checkpoint vil2_tiny16.th --data-root data/vtab-1k
python tools/vtab.py summarize work_dirs/vtab/vil-tiny_vtab1k
"""

import sys

from mmvil.evaluation.command import main

if __name__ == '__main__':
    sys.exit(main())

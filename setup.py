"""Package metadata of mmvil. Pure Python: nothing is compiled."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / 'mmvil' / 'version.py').read_text(encoding='utf-8'), VERSION)

# The maintained forks of OpenMMLab: same import names and configs as the originals, which no longer install.
OPENMMLAB = [
    'torchvision>=0.21',
    'onedl-mmengine>=0.10.12,<0.11',
    'onedl-mmcv>=2.3.6,<2.4',
    'onedl-mmpretrain>=1.3.6,<1.4',
    'onedl-mmsegmentation>=1.4.2,<1.5',
    'scikit-learn>=1.3',  # ships the handwritten digits of the embedded example
    'matplotlib>=3.7',
    'pillow>=10.1',
    'ftfy',  # undeclared needs of mmsegmentation
    'regex',
]
TEST = [
    *OPENMMLAB,
    'pytest>=8',
    'pytest-xdist>=3',
    'hypothesis>=6',
    'ruff>=0.8',
]

setup(
    name='mmvil',
    version=VERSION['__version__'],
    description='Vision-LSTM for OpenMMLab: backbone, Triton mLSTM operators, ImageNet recipes, published weights',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8') if (ROOT / 'README.md').is_file() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmvil', 'mmvil.*']),
    package_data={'mmvil.datasets': ['*.json']},
    install_requires=['torch>=2.6', 'numpy>=1.24', 'triton>=3.2; sys_platform == "linux"'],
    extras_require={
        'openmmlab': OPENMMLAB,
        'test': TEST,
        'bench': [*OPENMMLAB, 'timm>=1.0'],
        'docs': ['matplotlib>=3.7'],
        # Only to prepare VTAB-1K from its origin. TFDS 4.9.10 imports importlib_resources without asking for it.
        'tfds': ['tensorflow-datasets>=4.9', 'tensorflow', 'importlib_resources'],
    },
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)

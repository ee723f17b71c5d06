#!/usr/bin/env bash
# Train on several GPUs of one or more nodes: bash tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Several nodes: run it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set. Two trainings on one node need
# different values of PORT.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash $0 CONFIG GPUS [options of tools/train.py]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"

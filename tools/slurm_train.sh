#!/usr/bin/env bash
# Train through Slurm: GPUS=16 bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
# GPUS (default 8), GPUS_PER_NODE (default: at most 8), CPUS_PER_TASK (default 5) and SRUN_ARGS may be set.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: GPUS=8 bash $0 PARTITION JOB_NAME CONFIG [options of tools/train.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# SRUN_ARGS holds several words on purpose.
# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="$job_name" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"

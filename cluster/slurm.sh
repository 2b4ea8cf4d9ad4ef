#!/usr/bin/env bash
#SBATCH --job-name=videoclip
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
# A Ray cluster inside one Slurm job, and one videoclip command on it:
#   sbatch cluster/slurm.sh pretrain --shards /shared/tokens --output /shared/runs/pretrain --workers 64 --batches-per-step 64
# Submit from the repository, on storage that all nodes see, after `make install`. A job that is requeued or
# submitted again goes on from the last checkpoint.
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0
bin="$PWD/.venv/bin"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_address=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))

srun --nodes=1 --ntasks=1 -w "${nodes[0]}" \
  "$bin/ray" start --head --node-ip-address="$head_address" --port="$port" --include-dashboard=false --block &
sleep 15
if ((${#nodes[@]} > 1)); then
  others=$(IFS=,; echo "${nodes[*]:1}")
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) -w "$others" \
    "$bin/ray" start --address="$head_address:$port" --block &
  sleep 15
fi
"$bin/videoclip" "$@" --address "$head_address:$port"

#!/usr/bin/env bash
#SBATCH --job-name=videoclip
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# A Ray cluster inside one Slurm job, and one videoclip command on it:
#   sbatch cluster/slurm.sh pretrain --shards /shared/tokens --output /shared/runs/pretrain --workers 64 --batches-per-step 64
# Submit from the repository, on storage that all nodes see, after `make install`. Two minutes before its time is over
# Slurm tells this shell, which tells the command: it leaves a checkpoint and ends with exit code 75, and the job queues
# itself again. So a run of days goes through slots of hours.
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun takes one CPU a task otherwise, whatever the job has
bin="$PWD/.venv/bin"
again=75 # the command's exit code when nothing is wrong but it was told to stop
driver=""
steps=()

finish() { # CODE: end the Ray cluster, and queue again if the run only waits for more time
  trap '' TERM
  if ((${#steps[@]})); then kill "${steps[@]}" 2>/dev/null || true; fi
  wait
  if (($1 == again)); then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$1"
}

told=""
tell() { # what SIGTERM does
  told=yes
  if [[ $driver ]]; then kill -TERM "$driver" 2>/dev/null || true; else finish "$again"; fi
}
trap tell TERM

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_address=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')
address="$head_address:$((20000 + SLURM_JOB_ID % 20000))"
own=(--num-cpus="$SRUN_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block)

srun --nodes=1 --ntasks=1 -w "${nodes[0]}" "$bin/ray" start --head --node-ip-address="$head_address" \
  --port="${address#*:}" --include-dashboard=false "${own[@]}" &
steps+=($!)
ready() { # NODES: wait for these; in the background, so that SIGTERM is heard at once
  "$bin/python" "$PWD/cluster/wait_for_nodes.py" "$address" "$1" 180 &
  steps+=($!)
  wait $! || finish 1
}
ready 1
if ((${#nodes[@]} > 1)); then
  others=$(IFS=,; echo "${nodes[*]:1}")
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) -w "$others" \
    "$bin/ray" start --address="$address" "${own[@]}" &
  steps+=($!)
  ready "${#nodes[@]}"
fi

"$bin/videoclip" "$@" --address "$address" &
driver=$!
while true; do # SIGTERM ends a `wait` before the command has ended
  told="" code=0
  wait "$driver" || code=$?
  [[ $told ]] || break
done
finish "$code"

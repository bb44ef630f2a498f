#!/bin/bash
# A sweep on a Ray cluster of its own inside a Slurm allocation:  sbatch slurm.sh [VERB ARGS...]
# Change: the resources, SHARED, the environment, the default command. Submitted again, or requeued, it goes on.
#SBATCH --job-name=selfguide
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=selfguide-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before the time is up, to this script alone: it stops the sweep and puts itself back into the queue.
#SBATCH --signal=B:USR1@300
# A lost node costs its engines, not the job.
#SBATCH --no-kill
set -euo pipefail

SHARED=${SHARED:-/shared} # seen by every node: tasks, the student, the run folder, and the environment
[ ! -f "$SHARED/selfguide/bin/activate" ] || . "$SHARED/selfguide/bin/activate"
if [ $# -eq 0 ]; then
  set -- sweep "$SHARED/natural-instructions" --split test --recipe default --model "$SHARED/models/student" \
    --out "$SHARED/runs/ni-test" --set cluster.num_engines=28 --set cluster.num_trainers=4
fi

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*} # where this script runs
address=$(hostname --ip-address) address=${address%% *}
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$address:$port" # what the sweep joins
export RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0

# A token for this job, in a file that the user alone can read, in a home that every node sees.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.selfguide-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

driver=
stop_driver() {
  if [ -n "$driver" ]; then
    kill -TERM "$driver" 2> /dev/null || true
    wait "$driver" || true
  fi
}
end_ray() {
  # shellcheck disable=SC2046  # one word for each process
  kill -TERM $(jobs -p) 2> /dev/null || true
  wait || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap end_ray EXIT
trap 'stop_driver; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
trap 'stop_driver; exit 143' TERM # preempted or cancelled: Slurm requeues by itself, or does not

node=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block)
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 "${node[@]}" &
for _ in $(seq 120); do
  ray health-check --address "$RAY_ADDRESS" > /dev/null 2>&1 && break
  sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  srun --nodes="$others" --ntasks="$others" --exclude="$head" --no-kill --wait=0 \
    ray start --address="$RAY_ADDRESS" "${node[@]}" &
fi
# The sweep counts what the cluster has when it begins. In the background, since a trap waits for the foreground.
timeout 600 python -c '
import sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(1)
' "$SLURM_JOB_NUM_NODES" &
wait $!
echo "Ray has $SLURM_JOB_NUM_NODES nodes at $RAY_ADDRESS"

selfguide "$@" &
driver=$!
status=0
wait "$driver" || status=$?
exit "$status"

#!/bin/bash
#SBATCH --job-name=flaxcls
#SBATCH --output=flaxcls-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --partition=gpu

export JAX_OPTIMIZATION_LEVEL=O1
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
export SRUN_CPUS_PER_TASK=12
command=(python -m flaxcls.main --config=configs/imagenet_resnet50.py --workdir=gs://my-runs/r50 '--config.duration=90 epochs')
name=flaxcls
stop='2|43|45|130' # exit codes after which a restart is no use
max_failures=3

# Runs ${command[@]} as one step of tasks and decides by its exit code what becomes of the job.
# launch/slurm.py puts before this: the #SBATCH lines, the environment, command, name, stop and
# max_failures.
#
# SLURM itself sends SIGTERM to the tasks, before the time limit (--signal without B:), when it
# preempts and when the job is cancelled. In the latter two cases this shell is told too: it must
# stay alive until the tasks have saved, and must not put the job into the queue again, since a
# preempted job is requeued by SLURM and a cancelled one shall stay cancelled. Where this shell
# alone is told (--signal=B:TERM, scancel --batch) the job goes on, and is as before its time limit.

told=
# shellcheck disable=SC2329 # called by the trap
forward() {
  told=yes
  interrupted=yes
  # Not by srun, which kills its tasks when it is told SIGTERM. Where SLURM ends the job it refuses
  # this, and has told the tasks itself; who is told twice saves once.
  scancel --signal=TERM "$SLURM_JOB_ID.0" 2>/dev/null
}
trap forward TERM

# All tasks end together; a cluster's default may be to kill the others, in the middle of saving.
srun --kill-on-bad-exit=0 --wait=300 "${command[@]}" &
step=$!
while true; do
  interrupted=
  wait "$step"
  code=$? # of the step, the highest of its tasks, unless the trap ended the waiting
  [ -n "$interrupted" ] || break
done

requeue() {
  echo "$name: $1; into the queue again" >&2
  scontrol requeue "$SLURM_JOB_ID" || echo "$name: scontrol requeue failed" >&2
}

is_running() { # and not about to be ended by SLURM
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]
}

# A mistake would have ended the job at its first start. What ends it with the same code later is most
# likely its own process, which trains on: on a node that SLURM has lost, and has requeued the job for.
is_refused() { [ "$code" -eq 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; }

if [ "$code" -eq 0 ]; then
  echo "$name: done" >&2
elif [[ "$code" =~ ^($stop)$ ]] && ! is_refused; then
  echo "$name: exit code $code, to be looked at; see launch/README.md" >&2
elif [ -n "$told" ] && ! is_running; then
  echo "$name: exit code $code after SLURM ended the job" >&2
elif [ "$code" -eq 42 ]; then
  requeue "preempted, saved"
else
  failures="$name-$SLURM_JOB_ID.failures"
  echo "exit code $code" >>"$failures"
  if [ "$(wc -l <"$failures")" -le "$max_failures" ]; then
    requeue "exit code $code"
  else
    echo "$name: exit code $code, given up after $max_failures restarts" >&2
  fi
fi
exit "$code"

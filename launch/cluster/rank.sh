#!/usr/bin/env bash
# One rank of a job that srun or mpirun started: rank.sh LOGS COMMAND...
# Exports RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (the job exports MASTER_ADDR and MASTER_PORT), writes
# LOGS/rank-N.log (rank 0's on the job's output too) and, if it fails, a line in LOGS/failed: time, rank, exit code.
set -u
logs=$1
shift
missing='start me by srun or mpirun'
export RANK=${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:?$missing}}
export WORLD_SIZE=${SLURM_STEP_NUM_TASKS:-${OMPI_COMM_WORLD_SIZE:?$missing}}
export LOCAL_RANK=${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:?$missing}}
if [ -n "${OMPI_COMM_WORLD_LOCAL_SIZE:-}" ]; then export LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE; fi
: "${MASTER_ADDR:?export the first host}" "${MASTER_PORT:?export a free port}"
export MLINTERF_DS_RENDEZVOUS=env:// # explicit: this shell, not the launcher, is the parent of the rank

child=''
asked=''
forward() {
    asked=$1
    if [ -n "$child" ]; then kill -"$1" "$child" 2> /dev/null; fi
}
trap 'forward TERM' TERM
trap 'forward INT' INT

mkdir -p "$logs"
log=$logs/rank-$RANK.log
if [ "$RANK" = 0 ]; then
    "$@" > >(trap '' TERM INT && exec tee -a "$log") 2>&1 &
else
    "$@" >> "$log" 2>&1 &
fi
child=$!
if [ -n "$asked" ]; then forward "$asked"; fi # it came while the rank was started
wait $child
while kill -0 $child 2> /dev/null; do # a signal ends `wait`, not the rank, which saves now
    wait $child
done
wait $child # the rank's own status, whatever ended the last `wait`
status=$?
if [ $status -ne 0 ]; then
    sleep 0.2 # the rest of its log
    echo "$(date +%s.%N) $RANK $status" >> "$logs/failed"
fi
exit $status

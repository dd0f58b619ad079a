#!/usr/bin/env bash
# Runs one rank of a job that srun or mpirun started: rank.sh LOGS COMMAND...
# Exports RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (the job exports MASTER_ADDR and MASTER_PORT). The rank's output goes
# to LOGS/rank-N.log, that of rank 0 to the job's output too. A rank that fails writes LOGS/failed-N: time, rank, exit code.
set -u
logs=$1
shift
missing='start this script with srun or mpirun'
export RANK=${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:?$missing}}
export WORLD_SIZE=${SLURM_STEP_NUM_TASKS:-${OMPI_COMM_WORLD_SIZE:?$missing}}
export LOCAL_RANK=${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:?$missing}}
if [ -n "${OMPI_COMM_WORLD_LOCAL_SIZE:-}" ]; then export LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE; fi
: "${MASTER_ADDR:?export the first host}" "${MASTER_PORT:?export a free port}"
export MLINTERF_DS_RENDEZVOUS=env:// # the rank cannot infer it: its parent process is this shell, not the launcher

child=''
asked=''
forward() {
    asked=$1
    if [ -n "$child" ]; then kill -"$1" "$child" 2> /dev/null; fi
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP

mkdir -p "$logs"
log=$logs/rank-$RANK.log
if [ "$RANK" = 0 ]; then
    "$@" > >(trap '' TERM INT HUP && exec tee -a "$log") 2>&1 &
else
    "$@" >> "$log" 2>&1 &
fi
child=$!
if [ -n "$asked" ]; then forward "$asked"; fi # the signal came while the rank was being started
wait $child
while kill -0 $child 2> /dev/null; do # a signal ends `wait`, but not the rank, which is saving a checkpoint
    wait $child
done
wait $child # gives the rank's own status, whatever ended the last `wait`
status=$?
if [ $status -ne 0 ]; then
    sleep 0.2 # until the rest of its log is written
    echo "$(date +%s.%N) $RANK $status" > "$logs/failed-$RANK" # a file each: hosts that append to one over NFS lose lines
fi
exit $status

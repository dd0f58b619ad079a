#!/usr/bin/env bash
# launch/cluster/pretrain.sbatch on a real Slurm of one machine, set up here and taken down again. By hand, as root:
#     apt install slurm-wlm munge && tests/cluster/slurm.sh
# 1. a job that ends well; 2. one whose ranks get SIGTERM: saved, requeued, finished from there; 3. one with a rank
# killed; 4. one with a user's mistake. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-$(command -v python)} PYTHONPATH=$PWD OMP_NUM_THREADS=1
folder=$(mktemp -d)
chmod 755 "$folder"
host=$(hostname -s)
daemons=()
stop() {
    scancel --user root 2> /dev/null && sleep 3 || true
    for pid in "${daemons[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait
    rm -rf "$folder"
}
trap stop EXIT

mkdir "$folder"/{state,spool,munge}
chmod 700 "$folder/munge"
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 600 "$folder/munge/key"
munged --foreground --force --key-file "$folder/munge/key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munge/pid" --seed-file "$folder/munge/seed" --log-file "$folder/munge/log" 2> /dev/null &
daemons+=($!)
cat > "$folder/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmctldPort=17817
SlurmdPort=17818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=60
NodeName=$host CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
sleep 1
slurmctld -D 2> /dev/null & daemons+=($!)
slurmd -D 2> /dev/null & daemons+=($!)
for _ in $(seq 60); do sinfo -h -o %T 2> /dev/null | grep -q idle && break || sleep 1; done
sinfo

work=$folder/work
mkdir "$work"
settings=(train.batch=8 train.warmup=2 train.epoch_steps=4000 train.save_steps=10 model.width=32 model.ffn=64
    data.eval_rows=8 data.synthetic_sentences=600 tracking.enabled=false parallel.tensor=2 parallel.timeout=1)
arguments=(--deepspeed_config ds_configs/zero1.json)
for setting in "${settings[@]}"; do arguments+=(--set "$setting"); done
submit() { # submit NAME ARGUMENTS...: the job's number
    local name=$1
    shift
    sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --time=10 --mem=0 \
        --output="$work/$name.out" launch/cluster/pretrain.sbatch "$work/$name" "${arguments[@]}" "$@"
}
state() { scontrol show job "$1" | grep -o "$2=[^ ]*" | cut -d= -f2; }
await() { # await JOB STATES: until it is in one of them
    for _ in $(seq 1600); do
        if [[ " $2 " == *" $(state "$1" JobState) "* ]]; then return; fi
        sleep 0.5
    done
    echo "job $1 is $(state "$1" JobState), expected $2"
    exit 1
}
is() { # is JOB STATE EXIT: how it ended, or the end of its output
    [ "$(state "$1" JobState) $(state "$1" ExitCode)" = "$2 $3" ] && return
    echo "job $1 is $(state "$1" JobState) $(state "$1" ExitCode), expected $2 $3"
    tail -n 20 "$work"/*.out
    exit 1
}
saved() { ls "$work/$1/checkpoints" 2> /dev/null | grep -c '^step-[0-9]*$' || true; }
until_saved() { for _ in $(seq 3000); do [ "$(saved "$1")" -gt 0 ] && return || sleep 0.2; done; echo "$1 saved nothing"; exit 1; }

echo "--- 1. a job that ends well"
job=$(submit well --set train.steps=6)
await "$job" 'COMPLETED FAILED'
tr '\r' '\n' < "$work/well.out" | tail -n 8
ls "$work"/well/log/job-*
is "$job" COMPLETED 0:0

echo "--- 2. SIGTERM: saved, requeued, finished from there"
job=$(submit term --set train.steps=60)
until_saved term
scancel --signal=TERM "$job"
await "$job" 'PENDING COMPLETED FAILED'
[ "$(state "$job" Restarts)" = 1 ]
echo "Slurm holds a requeued job for two minutes"
await "$job" 'COMPLETED FAILED'
tr '\r' '\n' < "$work/term.out" | grep -a 'stopped by\|queue\|resumed\|steps in'
is "$job" COMPLETED 0:0

echo "--- 3. a rank killed"
job=$(submit kill --set train.steps=4000)
until_saved kill
pid=$(pgrep -f "launch/pretrain.py.*$work/kill" | while read -r pid; do
    tr '\0' '\n' < "/proc/$pid/environ" | grep -q '^RANK=1$' && [ "$(cat "/proc/$pid/comm")" != bash ] && echo "$pid"
done | head -n 1)
kill -9 "$pid"
await "$job" 'FAILED COMPLETED CANCELLED'
tail -n 3 "$work/kill.out"
tail -n 3 "$work/kill.out" | grep -q 'error: rank 1 was killed (SIGKILL'

echo "--- 4. a user's mistake"
job=$(submit mistake --set train.speed=9)
await "$job" 'FAILED COMPLETED'
tail -n 4 "$work/mistake.out"
tail -n 4 "$work/mistake.out" | grep -q 'unknown key'
is "$job" FAILED 2:0
echo "all as it should be"

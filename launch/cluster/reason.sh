#!/usr/bin/env bash
# Prints why a job of rank.sh failed: reason.sh LOGS
# Shows the last lines of the log of the rank that failed first, and ends with the exit code of that rank.
set -u
logs=$1
failed=$(cat "$logs"/failed-* 2> /dev/null | sort -n)
if [ -z "$failed" ]; then
    echo "error: no rank recorded a failure in $logs: a host was lost, or the launcher itself failed" >&2
    exit 1
fi
read -r _ rank status <<< "$failed"
echo >&2
tail -n 25 "$logs/rank-$rank.log" | tr '\r' '\n' | grep -v '^$' | tail -n 12 >&2
case $status in
137) how='was killed (SIGKILL: by someone, or for lack of memory)' ;;
*) how="failed with exit code $status" ;;
esac
echo "error: rank $rank $how, the first of $(wc -l <<< "$failed"); its log: $logs/rank-$rank.log" >&2
exit "$status"

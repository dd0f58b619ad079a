#!/usr/bin/env bash
# Say why a job of rank.sh failed: the rank that failed first, and the last lines of its log; end with its exit code.
# reason.sh LOGS
set -u
logs=$1
if [ ! -s "$logs/failed" ]; then
    echo "error: no rank noted a failure in $logs: a host was lost, or the launcher itself failed" >&2
    exit 1
fi
read -r _ rank status < <(sort -n "$logs/failed")
echo >&2
tail -n 25 "$logs/rank-$rank.log" | tr '\r' '\n' | grep -v '^$' | tail -n 12 >&2
case $status in
137) how='was killed (SIGKILL: out of memory, or by someone)' ;;
*) how="failed with exit code $status" ;;
esac
echo "error: rank $rank $how, the first of $(wc -l < "$logs/failed"); its log: $logs/rank-$rank.log" >&2
exit "$status"

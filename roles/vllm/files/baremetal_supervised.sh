#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Starts a server for supervisor, whose own limit counts only ends within the first seconds: LIMIT starts within an hour, as systemd.
#
#   baremetal_supervised.sh LIMIT FILE COMMAND...
#
# FILE has the time of each start. Status 78 is the one that is not started again.
set -eu
limit=$1 file=$2
shift 2
now=$(date +%s)
recent='' number=0
for start in $(cat "$file" 2>/dev/null || true); do
    if [ "$start" -gt $((now - 3600)) ]; then
        recent="$recent $start" number=$((number + 1))
    fi
done
if [ "$number" -ge "$limit" ]; then
    echo "baremetal: $limit starts within an hour (vllm_restart_limit): left alone. Mend it and run site.yml"
    exit 78
fi
if [ "$number" -gt 0 ]; then
    sleep 5
fi
# On a disk that is full, servers go on, at a slower pace and with no limit.
echo "$recent $now" >"$file" || sleep 5
# A core dump would hold the API key, and be as large as the engine.
# shellcheck disable=SC3045 # every sh of the supported distributions has it (dash, bash)
ulimit -c 0
exec "$@"

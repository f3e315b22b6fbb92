#!/bin/sh
# Says every second or two what the client takes: MiB that are resident, the most that were, and seconds of processor.
ticks=$(getconf CLK_TCK)
while sleep 1; do
    read -r pid </sys/fs/cgroup/system.slice/fedge-client.service/cgroup.procs || continue
    [ -r "/proc/$pid/status" ] || continue
    awk '/^VmHWM/ {high = $2} /^VmRSS/ {now = $2} END {printf "probe: rss %.1f hwm %.1f", now / 1024, high / 1024}' "/proc/$pid/status"
    awk -v ticks="$ticks" '{printf " cpu %.1f\n", ($14 + $15) / ticks}' "/proc/$pid/stat"
done 2>/dev/null

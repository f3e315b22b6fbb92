#!/bin/sh
# Says every second or two what the client takes: MiB that are resident, the most that were, and seconds of processor.
ticks=$(getconf CLK_TCK)
while sleep 1; do
    read -r pid </sys/fs/cgroup/system.slice/fedge-client.service/cgroup.procs || continue
    # /proc/PID/stat has its times in fields 14 and 15; the program's name has no blanks here.
    awk -v ticks="$ticks" '/^VmHWM/ {high = $2} /^VmRSS/ {now = $2} NF > 40 {cpu = ($14 + $15) / ticks}
        END {printf "probe: rss %.1f hwm %.1f cpu %.1f\n", now / 1024, high / 1024, cpu}' "/proc/$pid/status" "/proc/$pid/stat"
done 2>/dev/null

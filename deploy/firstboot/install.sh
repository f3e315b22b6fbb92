#!/bin/sh
# Puts what takes over the card's folder into a system: two programs, units, a user. With "now" it starts it too; otherwise
# the next boot does. Run again, it does the same again. For a test, ROOT=folder stands for the system.
set -eu
here=$(dirname "$0")
root="${ROOT:-}"

put() {
    mkdir -p "$root$2"
    cp "$1" "$root$2/.new-$(basename "$1")"
    chmod "$3" "$root$2/.new-$(basename "$1")"
    # What is half written after a power cut has another name.
    sync
    mv -f "$root$2/.new-$(basename "$1")" "$root$2/$(basename "$1")"
}

for file in "$here"/lib/*.py; do
    put "$file" /usr/local/lib/fedge 755
done
for name in sysusers.d tmpfiles.d; do
    put "$here/$name/fedge.conf" "/etc/$name" 644
done
put "$here/journald.conf.d/fedge.conf" /etc/systemd/journald.conf.d 644

units=""
for file in "$here"/units/*; do
    put "$file" /etc/systemd/system 644
    unit=$(basename "$file")
    targets=$(sed -n 's/^WantedBy=//p' "$file")
    for target in $targets; do
        mkdir -p "$root/etc/systemd/system/$target.wants"
        ln -sf "../$unit" "$root/etc/systemd/system/$target.wants/$unit"
    done
    [ -z "$targets" ] || units="$units $unit"
done
sync
# Where this could be cut off and not be started again, somebody asks for what comes last.
: >"$root/usr/local/lib/fedge/.whole"
sync

if [ "${1:-}" = now ]; then
    systemctl daemon-reload
    # shellcheck disable=SC2086 # several units
    systemctl start --no-block $units
fi

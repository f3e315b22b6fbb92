#!/bin/sh
# Started once by systemd.run= on the kernel's command line (kernel-command-line.service), before anything else of a boot.
# It may be cut off at any line: as long as its name is on the command line, the next boot starts it again.
here=$(dirname "$0")
boot=$(dirname "$here")

# Raspberry Pi OS otherwise asks on the screen for the name of its first user.
if [ -x /usr/lib/userconf-pi/userconf ]; then
    /usr/lib/userconf-pi/userconf '@USER@' '' || echo "fedge: the user @USER@ could not be set up" >/dev/console
fi

if ! sh "$here/install.sh"; then
    echo "fedge: could not be installed, and this system starts without it; is its disk full?" >/dev/console
fi

sed -e 's| systemd\.run=[^ ]*||; s| systemd\.run_success_action=[^ ]*||; s| systemd\.unit=kernel-command-line\.target||' \
    "$boot/cmdline.txt" >"$boot/cmdline.new"
sync
mv -f "$boot/cmdline.new" "$boot/cmdline.txt"
sync
exit 0

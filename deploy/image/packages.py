"""What the system of a card is made of: Debian packages, and what of them is left out."""

SUITE = "bookworm"
"""Debian 12: its kernel has the device trees of Pi 3, 3+, 4, 400, Zero 2 W and their compute modules; not of Pi 5."""
ARCHITECTURE = "arm64"
COMPONENTS = "main non-free-firmware"
PYTHON = (3, 11)
"""The suite's, which the client's wheels have to be for."""

PACKAGES = (
    "usr-is-merged",
    # The system, its clock and its names.
    "systemd",
    "systemd-sysv",
    "systemd-resolved",
    "systemd-timesyncd",
    "udev",
    "dbus",
    "kmod",
    "passwd",
    # The kernel, and what a Pi's GPU loads before it.
    "linux-image-arm64",
    "initramfs-tools",
    "raspi-firmware",
    # Wifi, of the country that it is in.
    "firmware-brcm80211",
    "wireless-regdb",
    "wpasupplicant",
    # Growing and checking the card's file systems.
    "e2fsprogs",
    "dosfstools",
    "fdisk",
    # To log in with a key, where the card brings one, and to update the system.
    "openssh-server",
    "apt",
    # What the client's wheels stand on: all of Python's library (numpy needs more than python3-minimal), and C++'s.
    "python3",
    "libstdc++6",
)

_DRIVERS = "/lib/modules/*/kernel/drivers"
LEFT_OUT = (
    # What nobody reads on a device without a screen, and licences that must stay.
    ("exclude", "/usr/share/man/*"),
    ("exclude", "/usr/share/info/*"),
    ("exclude", "/usr/share/locale/*"),
    ("exclude", "/usr/share/doc/*"),
    ("include", "/usr/share/doc/*/copyright"),
    # Drivers of what no Pi has: two thirds of the kernel's package.
    ("exclude", "/lib/modules/*/kernel/sound/*"),
    *(
        ("exclude", f"{_DRIVERS}/{name}/*")
        for name in ("accel", "ata", "edac", "fpga", "hwtracing", "infiniband", "isdn", "media", "nvme", "staging")
    ),
    ("exclude", f"{_DRIVERS}/gpu/drm/amd/*"),
    ("exclude", f"{_DRIVERS}/gpu/drm/nouveau/*"),
    ("exclude", f"{_DRIVERS}/gpu/drm/radeon/*"),
    ("exclude", f"{_DRIVERS}/net/ethernet/*"),
    ("include", f"{_DRIVERS}/net/ethernet/broadcom"),
    ("include", f"{_DRIVERS}/net/ethernet/broadcom/genet*"),
    ("exclude", f"{_DRIVERS}/net/wireless/*"),
    ("include", f"{_DRIVERS}/net/wireless/broadcom*"),
    ("exclude", "/lib/modules/*/kernel/fs/ocfs2/*"),
    ("exclude", "/lib/modules/*/kernel/fs/gfs2/*"),
    ("exclude", "/lib/modules/*/kernel/fs/ceph/*"),
    ("exclude", "/lib/modules/*/kernel/fs/xfs/*"),
    ("exclude", "/lib/modules/*/kernel/fs/bcachefs/*"),
    # Firmware of the GPU for older and for other boards, and its variants with a camera or for looking for errors.
    ("exclude", "/usr/lib/raspi-firmware/*cd.*"),
    ("exclude", "/usr/lib/raspi-firmware/*_x.*"),
    ("exclude", "/usr/lib/raspi-firmware/*4x.*"),
    ("exclude", "/usr/lib/raspi-firmware/*db.*"),
)
"""Patterns for dpkg's ``path-exclude`` and ``path-include``, in their order; the later ones win."""

UNUSED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
)
"""Units that would write to the card, or surprise a device in the field, by themselves."""
USED = ("systemd-networkd.service", "wpa_supplicant@wlan0.service", "fedge-grow.service")
"""Units that are not on unless told."""

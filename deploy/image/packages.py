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
    "sudo",
    "apt",
    # What the client's wheels stand on: all of Python's library (numpy needs more than python3-minimal), and C++'s.
    "python3",
    "libstdc++6",
)

_KERNEL = "/lib/modules/*/kernel"
_DRIVERS = f"{_KERNEL}/drivers"
LEFT_OUT = (
    # What nobody reads on a device without a screen, and licences that must stay.
    ("exclude", "/usr/share/man/*"),
    ("exclude", "/usr/share/info/*"),
    ("exclude", "/usr/share/locale/*"),
    ("exclude", "/usr/share/doc/*"),
    ("include", "/usr/share/doc/*/copyright"),
    # Drivers of what no Pi has, more than half of the kernel's package; cameras and microphones on USB work.
    *(
        ("exclude", f"{_DRIVERS}/{name}/*")
        for name in ("accel", "ata", "edac", "fpga", "hwtracing", "infiniband", "isdn", "nvme", "staging", "target")
    ),
    *(("exclude", f"{_DRIVERS}/gpu/drm/{name}/*") for name in ("amd", "nouveau", "radeon")),
    *(
        ("exclude", f"{_DRIVERS}/scsi/{name}/*")
        for name in ("bfa", "be2iscsi", "lpfc", "megaraid", "qla2xxx", "qla4xxx")
    ),
    ("exclude", f"{_DRIVERS}/net/ethernet/*"),
    ("include", f"{_DRIVERS}/net/ethernet/broadcom"),
    ("include", f"{_DRIVERS}/net/ethernet/broadcom/genet*"),
    ("exclude", f"{_DRIVERS}/net/wireless/*"),
    ("include", f"{_DRIVERS}/net/wireless/broadcom*"),
    ("exclude", f"{_DRIVERS}/media/*"),
    *(("include", f"{_DRIVERS}/media/{name}*") for name in ("common", "mc", "v4l2-core")),
    ("include", f"{_DRIVERS}/media/usb"),
    ("include", f"{_DRIVERS}/media/usb/uvc*"),
    ("exclude", f"{_KERNEL}/sound/*"),
    *(("include", f"{_KERNEL}/sound/{name}*") for name in ("core", "soundcore", "usb")),
    *(("exclude", f"{_KERNEL}/fs/{name}/*") for name in ("btrfs", "ceph", "gfs2", "ocfs2", "ubifs", "xfs")),
    # Device trees of other makers' boards.
    ("exclude", "/usr/lib/linux-image-*/*"),
    ("include", "/usr/lib/linux-image-*/broadcom*"),
    # The GPU's firmware with its camera, with traces, and cut down.
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
    "wpa_supplicant.service",
)
"""Units that would write to the card, or surprise a device in the field, by themselves; and the supplicant that waits
for NetworkManager: a device with wifi has ``wpa_supplicant@wlan0.service``, which its first boot switches on.
"""
USED = ("systemd-networkd.service", "fedge-grow.service")
"""Units that are not on unless told."""

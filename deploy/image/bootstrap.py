"""The system's files from Debian's packages, by mmdebstrap: a tar, kept while what it is made of stays."""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from deploy.image.layer import Layer
from deploy.image.packages import ARCHITECTURE, COMPONENTS, LEFT_OUT, PACKAGES, SUITE, UNUSED, USED
from edge_client.errors import ConfigError

_EMULATOR = "qemu-user-static binfmt-support arch-test"
_HOOKS = Path("/usr/share/mmdebstrap/hooks/merged-usr")
# Host keys are each device's own, and making some under emulation takes 10 seconds: the package finds some already.
_KEYS = ("rsa", "ecdsa", "ed25519")


@dataclass(frozen=True)
class Base:
    """What the system is made of."""

    sources: tuple[str, ...] = ()
    """Lines of sources.list; none are mmdebstrap's own."""

    def key(self) -> str:
        """The hash of all of it."""
        parts = [self.sources, _PREPARE, _FINISH, SUITE, ARCHITECTURE, COMPONENTS, PACKAGES, LEFT_OUT, UNUSED, USED]
        return hashlib.sha256(json.dumps([*parts, _overlay().digest()]).encode()).hexdigest()


def sources(mirror: str | None = None) -> tuple[str, ...]:
    """Where packages come from: ``mirror``, else what this machine's apt is configured with, where it is a Debian's.

    A mirror is the URL of an archive with the suite and its updates; a security archive is looked for beside it, under
    the name that Debian's has.
    """
    if mirror is not None:
        plain = mirror.rstrip("/")
        places = [(plain, SUITE), (plain, f"{SUITE}-updates"), (f"{plain}-security", f"{SUITE}-security")]
    else:
        wanted = (SUITE, f"{SUITE}-updates", f"{SUITE}-security")
        places = [(site, suite) for site, suite in _configured() if suite in wanted]
        if SUITE not in [suite for _, suite in places]:
            return ()
    return tuple(f"deb {site} {suite} {COMPONENTS}" for site, suite in places)


def _configured() -> list[tuple[str, str]]:
    """Archives of Debian that apt knows, with their suites."""
    if shutil.which("apt-get") is None:
        return []
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)|$(CODENAME)|$(ORIGIN)", "Created-By: Packages"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    found = [line.split("|") for line in told.splitlines()]
    return list(dict.fromkeys((site.rstrip("/"), suite) for site, suite, origin in found if origin == "Debian"))


def ensure(base: Base, cache: Path, log: Callable[[str], None]) -> Path:
    """The tar of ``base``: the one in ``cache``, or a new one.

    Raises:
        ConfigError: this machine lacks what it takes, or a package cannot be had; mmdebstrap's log says which.
    """
    place = cache / f"system-{base.key()[:16]}.tar"
    if place.exists():
        log(f"the system's packages are unchanged: {place}")
        return place
    check_machine()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made, journal = Path(scratch) / "system.tar", cache / "mmdebstrap.log"
        log(f"installing {len(PACKAGES)} packages of Debian {SUITE} and what they need; a few minutes; log: {journal}")
        with journal.open("wb") as out:
            status = _bootstrap(base, made, Path(scratch), out.fileno())
        if status:
            lines = [line for line in journal.read_text(errors="replace").splitlines() if line.startswith(("E:", "W:"))]
            raise ConfigError(
                f"mmdebstrap ended with status {status}: {' '.join(lines[-3:]) or 'no error named'}; see {journal}"
            )
        made.replace(place)
    return place


def check_machine() -> None:
    """Raise ConfigError, with the remedy, where this machine cannot install arm64 packages."""
    lacking = [one for one in ("mmdebstrap", "arch-test") if shutil.which(one) is None]
    if lacking:
        raise ConfigError(
            f"{' and '.join(lacking)} not found: building a system takes the Debian packages mmdebstrap {_EMULATOR}; "
            "or put the client on Raspberry Pi OS Lite instead: fedge flash without --build"
        )
    if platform.machine() == "aarch64" or _runs():
        return
    if os.geteuid() == 0:
        # Containers often come without this file system, and with the rights to mount it.
        registry = Path("/proc/sys/fs/binfmt_misc")
        if not (registry / "register").exists():
            subprocess.run(["mount", "-t", "binfmt_misc", "none", str(registry)], capture_output=True, check=False)  # noqa: S603, S607
        if shutil.which("update-binfmts"):
            subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], capture_output=True, check=False)  # noqa: S607
        if _runs():
            return
    raise ConfigError(
        f"this machine cannot run arm64 programs: install {_EMULATOR}, and as root do "
        "'mount -t binfmt_misc none /proc/sys/fs/binfmt_misc; update-binfmts --enable qemu-aarch64'"
    )


def _runs() -> bool:
    return subprocess.run(["arch-test", ARCHITECTURE], capture_output=True, check=False).returncode == 0  # noqa: S603, S607


def _overlay() -> Layer:
    layer = Layer()
    with as_file(files("deploy.image") / "overlay") as folder:
        layer.tree("", folder)
    # Readable by all, as systemd wants it, and of this device from its first boot on.
    layer.file("etc/machine-id", b"uninitialized\n")
    with as_file(files("deploy") / "sysusers.d" / "fedge.conf") as users:
        layer.file("usr/lib/sysusers.d/fedge.conf", users.read_bytes())
    return layer


def _bootstrap(base: Base, made: Path, scratch: Path, out: int) -> int:
    overlay = scratch / "overlay.tar"
    overlay.write_bytes(_overlay().pack())
    command = ["mmdebstrap", "--verbose", "--mode=auto", "--variant=essential", f"--architectures={ARCHITECTURE}"]
    if _HOOKS.is_dir():
        command.append(f"--hook-dir={_HOOKS}")
    command += [
        f"--include={','.join(PACKAGES)}",
        f"--components={COMPONENTS}",
        '--aptopt=Apt::Install-Recommends "false"',
        # The files that the overlay brings are there before the packages that would ask.
        "--dpkgopt=force-confdef",
        "--dpkgopt=force-confold",
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-{what}={pattern}" for what, pattern in LEFT_OUT),
        f"--essential-hook=tar-in {shlex.quote(str(overlay))} /",
        f"--essential-hook={_PREPARE}",
        f"--customize-hook={_FINISH}",
        SUITE,
        str(made),
        *base.sources,
    ]
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    # mmdebstrap in a user namespace has to reach the folder.
    scratch.chmod(0o755)
    return subprocess.run(command, stdout=out, stderr=out, env=environment, check=False).returncode  # noqa: S603


_PREPARE = f"""
set -eu
mkdir -p "$1/etc/ssh" "$1/boot/firmware"
for kind in {" ".join(_KEYS)}; do touch "$1/etc/ssh/ssh_host_${{kind}}_key"; done
# One initramfs, with the kernel; and none once more for what is configured after it.
echo update_initramfs=no > "$1/etc/initramfs-tools/update-initramfs.conf"
"""
_FINISH = f"""
set -eu
for kind in {" ".join(_KEYS)}; do rm -f "$1/etc/ssh/ssh_host_${{kind}}_key"*; done
echo update_initramfs=yes > "$1/etc/initramfs-tools/update-initramfs.conf"
chroot "$1" systemd-sysusers
chroot "$1" systemctl enable {" ".join(USED)}
chroot "$1" systemctl mask {" ".join(UNUSED)}
chroot "$1" useradd --create-home --shell /bin/bash --uid 1000 --groups sudo,adm,fedge pi
ln -sf ../run/systemd/resolve/stub-resolv.conf "$1/etc/resolv.conf"
echo uninitialized > "$1/etc/machine-id"
rm -rf "$1"/var/log/*.log "$1"/var/log/apt "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old
# The clock of a device without one starts no earlier than here.
mkdir -p "$1/var/lib/systemd/timesync"
touch "$1/var/lib/systemd/timesync/clock"
chroot "$1" chown -R systemd-timesync: /var/lib/systemd/timesync
test -s "$1/boot/firmware/config.txt"
"""

#!/usr/bin/python3
"""Takes over what `fedge flash` has put on the boot partition, as root, at each boot: usually there is nothing.

Each part is taken by itself: put in its place on the root file system, made durable, then removed from the boot
partition, which anybody can read who has the card. The power may be cut at any instant; the next boot does the rest.
Standard library alone: it runs before the client is installed.
"""

import argparse
import contextlib
import grp
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USER = "fedge"
_WHOLE = ".whole"
"""Is written into a release's folder when it is installed and durable."""

_TAKEN = ".taken"
"""How the name ends of what is to be erased."""

Run = Callable[[Sequence[str]], None]


class Trouble(Exception):  # noqa: N818
    """What went wrong, in words for whoever looks at the console."""


@dataclass(frozen=True)
class Places:
    """Where things are: below ``root`` for a test, and the folder on the boot partition."""

    root: Path
    card: Path

    def at(self, path: str) -> Path:
        """A path of the system."""
        return self.root / path.lstrip("/")

    @property
    def live(self) -> bool:
        """Whether this is the system itself, whose users and programs can be asked."""
        return self.root == Path("/")


def say(line: str) -> None:
    """Tell the journal and the console, which is where the unit sends it."""
    print(f"fedge: {line}", flush=True)


def take_over(places: Places, run: Run) -> None:
    """Do what is still to be done.

    Raises:
        Trouble: something cannot be done; what came before it is done.
    """
    if places.live:
        # The user of the service; of the folders' modes, systemd-tmpfiles is the keeper.
        run(["systemd-sysusers"])
        run(["systemd-tmpfiles", "--create", "fedge.conf"])
    for left in places.card.glob(f"*{_TAKEN}"):
        erase(left)
    card = places.card / "card.toml"
    if card.exists():
        personalise(places, read_toml(card), run)
        forget(card)
    take(places, places.card / "device.toml", places.at("/etc/fedge/device.toml"), owner=None)
    believe(places, places.card / "claim.fedgeclaim")
    take(places, places.card / "claim.fedgeclaim", places.at("/var/lib/fedge/claim.fedgeclaim"), owner=USER)
    if (places.card / "wheels").is_dir():
        # Without their list they are what an earlier boot was cut off at removing.
        if (places.card / "wheels" / "SHA256SUMS").exists() or not places.at("/opt/fedge/current").exists():
            install(places, run)
        remove_folder(places.card / "wheels")


def take(places: Places, source: Path, target: Path, owner: str | None) -> None:
    """Move a secret from the boot partition to a file that its owner alone may read."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, source.read_bytes(), 0o600, owner=owner if places.live else None)
    say(f"took over {source.name}")
    forget(source)


def believe(places: Places, claim: Path) -> None:
    """Write down whose releases this device believes, from the claim on the card: who holds the card decides.

    From nowhere else: the claim is the service's user's from then on, who must not become root by writing another one.
    """
    try:
        said = json.loads(claim.read_text())
        kept = json.dumps({"federation": said["federation"], "pins": said["pins"]})
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError) as error:
        say(f"{claim.name} on the boot partition is damaged ({error}): this device will not believe any release")
        return
    target = places.at("/opt/fedge/trust.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, kept.encode(), 0o644)


def personalise(places: Places, card: dict[str, Any], run: Run) -> None:
    """Set host name, network and who may log in."""
    if isinstance(hostname := card.get("hostname"), str):
        write(places.at("/etc/hostname"), f"{hostname}\n".encode(), 0o644)
        hosts = places.at("/etc/hosts")
        known = hosts.read_text().splitlines() if hosts.exists() else ["127.0.0.1 localhost", "::1 localhost"]
        kept = [line for line in known if not line.startswith("127.0.1.1")]
        write(hosts, "\n".join([*kept, f"127.0.1.1 {hostname}", ""]).encode(), 0o644)
        if places.live:
            run(["hostname", hostname])
    if keys := card.get("ssh_keys"):
        authorise(places, str(card.get("user", "pi")), [str(key) for key in keys], run)
    if wifi := card.get("wifi"):
        join_network(places, wifi, run)


def authorise(places: Places, user: str, keys: list[str], run: Run) -> None:
    """Let the holders of keys log in; without their user, root is the one."""
    passwd = places.at("/etc/passwd")
    rows = [line.split(":") for line in passwd.read_text().splitlines()] if passwd.exists() else []
    # Raspberry Pi OS has renamed its first user by now, an image of ours has perhaps none.
    row = next((one for one in rows if one[0] == user or one[2:3] == ["1000"]), None)
    home = places.at(row[5] if row is not None else "/root")
    folder = home / ".ssh"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / "authorized_keys"
    known = file.read_text().splitlines() if file.exists() else []
    write(file, "\n".join([*known, *(key for key in keys if key not in known), ""]).encode(), 0o600)
    if places.live:
        owner = (int(row[2]), int(row[3])) if row is not None else (0, 0)
        for path in (folder, file):
            os.chown(path, *owner)
        # There may be no SSH server, which is not our business.
        with contextlib.suppress(Trouble):
            run(["systemctl", "enable", "ssh.service"])
            # It waits for the network, which waits for this.
            run(["systemctl", "start", "--no-block", "ssh.service"])


def join_network(places: Places, wifi: dict[str, Any], run: Run) -> None:
    """Join a Wi-Fi network with NetworkManager where there is one, else with wpa_supplicant."""
    ssid, key, country = str(wifi["ssid"]), str(wifi.get("key", "")), str(wifi.get("country", ""))
    if places.at("/etc/NetworkManager").is_dir():
        # A list of bytes: every name can be written that way (man nm-settings-keyfile).
        lines = ["[connection]", "id=fedge", "type=wifi", "", "[wifi]", "mode=infrastructure"]
        lines += [f"ssid={''.join(f'{byte};' for byte in ssid.encode())}", ""]
        lines += ["[wifi-security]", "key-mgmt=wpa-psk", f"psk={key}", ""] if key else []
        lines += ["[ipv4]", "method=auto", "", "[ipv6]", "method=auto", ""]
        target = places.at("/etc/NetworkManager/system-connections/fedge.nmconnection")
        reload = ["nmcli", "connection", "reload"]
    else:
        lines = ["ctrl_interface=DIR=/run/wpa_supplicant GROUP=netdev", *([f"country={country}"] if country else [])]
        lines += ["network={", f"    ssid={ssid.encode().hex()}", "    scan_ssid=1"]
        lines += [f"    psk={key}", "    key_mgmt=WPA-PSK WPA-PSK-SHA256"] if key else ["    key_mgmt=NONE"]
        lines += ["}", ""]
        target = places.at("/etc/wpa_supplicant/wpa_supplicant-wlan0.conf")
        reload = ["systemctl", "enable", "wpa_supplicant@wlan0.service"]
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, "\n".join(lines).encode(), 0o600)
    if places.live:
        # It may not run yet, and reads the file when it does.
        with contextlib.suppress(Trouble):
            run(reload)


def install(places: Places, run: Run) -> None:
    """Install the client from the wheels on the boot partition, without a network.

    Raises:
        Trouble: a wheel is damaged, or it cannot be installed.
    """
    wheels = places.card / "wheels"
    names = check_sums(wheels)
    version = next(name.split("-")[1] for name in names if name.startswith("fedge-"))
    releases = places.at("/opt/fedge/releases")
    release = releases / version
    if not (release / _WHOLE).exists():
        say(f"installing fedge {version}: this takes minutes, once")
        shutil.rmtree(release, ignore_errors=True)
        releases.mkdir(parents=True, exist_ok=True)
        # Raspberry Pi OS Lite may lack ensurepip; pip comes as a wheel, and runs from it.
        run([sys.executable, "-m", "venv", "--without-pip", str(release)])
        pip = next(str(wheels / name / "pip") for name in names if name.startswith("pip-"))
        python = str(release / "bin" / "python")
        install_all = ["install", "--quiet", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]
        run([python, pip, *install_all, "--find-links", str(wheels), f"fedge=={version}"])
        run([str(release / "bin" / "fedge"), "--version"])
        # Thousands of files: one by one would take longer.
        os.sync()
        write(release / _WHOLE, b"", 0o644)
    switch(places.at("/opt/fedge"), version)
    say(f"fedge {version} is installed")


def switch(folder: Path, version: str) -> None:
    """Make a release the current one, at once; the one that was so is ``previous``."""
    current = folder / "current"
    wanted = f"releases/{version}"
    if current.is_symlink():
        before = os.readlink(current)
        if before == wanted:
            return
        link(folder / "previous", before)
    link(current, wanted)


def link(path: Path, target: str) -> None:
    """Point a symbolic link somewhere, atomically and durably."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    os.symlink(target, new)
    os.replace(new, path)
    sync_folder(path.parent)


def check_sums(folder: Path) -> list[str]:
    """The names in a folder's SHA256SUMS, whose files are as they were written.

    Raises:
        Trouble: one is not.
    """
    names = []
    sums = folder / "SHA256SUMS"
    for line in sums.read_text().splitlines() if sums.exists() else ():
        wanted, _, name = line.partition("  ")
        path = folder / Path(name).name
        with contextlib.suppress(OSError):
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == wanted:
                names.append(path.name)
                continue
        raise Trouble(f"{name} on the boot partition is missing or damaged: write this card anew, or another card")
    for needed in ("fedge-", "pip-"):
        if not any(name.startswith(needed) for name in names):
            raise Trouble(f"there is no wheel {needed}* on the boot partition: write this card anew")
    return names


def read_toml(path: Path) -> dict[str, Any]:
    """What a file says; what cannot be read says nothing, which is told."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        say(f"{path.name} on the boot partition is damaged ({error}) and left out: write this card anew")
        return {}


def write(path: Path, data: bytes, mode: int, owner: str | None = None) -> None:
    """Write a file durably: after a power cut it is the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        os.fchmod(descriptor, mode)
        if owner is not None:
            os.fchown(descriptor, pwd.getpwnam(owner).pw_uid, grp.getgrnam(owner).gr_gid)
        file.flush()
        os.fsync(descriptor)
    os.replace(new, path)
    sync_folder(path.parent)


def forget(path: Path) -> None:
    """Remove a file from the boot partition: from now on it is not taken again, be it erased or not yet."""
    taken = path.with_name(path.name + _TAKEN)
    os.replace(path, taken)
    sync_folder(path.parent)
    erase(taken)


def erase(path: Path) -> None:
    """Overwrite a file and remove it; what the card's own controller keeps is out of reach."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; the list of what is in it goes first, so that a rest is not taken for the whole."""
    (path / "SHA256SUMS").unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path, ignore_errors=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make durable what names a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def execute(command: Sequence[str]) -> None:
    """Run a program.

    Raises:
        Trouble: it fails; with the last thing that it said.
    """
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    except OSError as error:
        raise Trouble(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise Trouble(f"{' '.join(command)[:200]} ended with {done.returncode}: {said[-1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 where something cannot be done, which is said in one line."""
    parser = argparse.ArgumentParser(description="take over what fedge flash has put on the boot partition")
    parser.add_argument("--root", type=Path, default=Path("/"), help="a folder in the place of the system, for a test")
    parser.add_argument("--boot", type=Path, default=None, help="where the boot partition is  [ROOT/boot/firmware]")
    told = parser.parse_args(arguments)
    places = Places(told.root, (told.boot or told.root / "boot/firmware") / "fedge")
    if not places.card.is_dir():
        return 0
    try:
        take_over(places, execute)
    except (Trouble, OSError) as error:
        say(f"FIRST BOOT FAILED: {error}; the next boot tries again")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

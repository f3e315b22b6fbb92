"""What goes on the boot partition of a card: the folder that its first boot takes over, and what starts that."""

import hashlib
import importlib.metadata
import importlib.resources
import re
import time
from collections.abc import Mapping
from pathlib import Path

from deploy.flash.fat import Fat
from deploy.flash.official import OURS, System
from deploy.flash.settings import CardSettings, Wifi, quoted

FOLDER = "fedge"
"""On the boot partition, which a Raspberry Pi mounts at /boot/firmware."""
CLAIM = f"{FOLDER}/claim.fedgeclaim"
_MOUNT = f"/boot/firmware/{FOLDER}"
_WHOLE = "/usr/local/lib/fedge/.whole"
"""Is there when ``install.sh`` has done its work."""
_BEGUN = "/var/lib/cloud/instance/sem/*scripts_user*"
"""Is there as soon as cloud-init has begun with runcmd, which it then never does again."""
_GROUPS = "users,adm,dialout,audio,netdev,video,plugdev,input,gpio,spi,i2c,render,sudo"
_NOT_A_DEVICES = "fedge-server.service"

Files = dict[str, bytes | Path]


def write(boot: Fat, system: System, settings: CardSettings, wheels: Mapping[str, Path], *, now: float) -> None:
    """Make a card's boot partition that of a device; ``now`` is the time that its first boot at least must see.

    What switches it on is written last: a card that was pulled out meanwhile boots as it did.

    Raises:
        FlashError: there is no room for it, or the file system is damaged.
    """
    line = (boot.read("cmdline.txt") or b"").decode(errors="surrogateescape")
    boot.remove(FOLDER)
    files: Files = {} if system.kind == "client" else _program(wheels)
    files |= folder(settings, now=now, card=system.kind in ("client", "firstrun"))
    boot.write(files)
    switches: Files = {}
    tokens = {} if settings.wifi is None else {"cfg80211.ieee80211_regdom": settings.wifi.country}
    match system.kind:
        case "firstrun":
            switches[f"{FOLDER}/firstrun.sh"] = _firstrun(settings)
            tokens |= {
                "systemd.run": f"{_MOUNT}/firstrun.sh",
                "systemd.run_success_action": "reboot",
                "systemd.unit": "kernel-command-line.target",
            }
        case "cloud-init":
            data = _user_data(settings)
            instance = f"fedge-{hashlib.sha256(data + settings.device_toml.encode()).hexdigest()[:16]}"
            switches |= {"user-data": data, "meta-data": f"{OURS}\ndsmode: local\ninstance-id: {instance}\n".encode()}
            if settings.wifi is not None:
                switches["network-config"] = _network_config(settings.wifi)
            # What the command line says of the instance counts more than meta-data, and Imager may have left its own.
            tokens["ds"] = f"nocloud;i={instance}"
        case "preseed":
            switches["rpi-preseed.toml"] = _preseed(settings)
        case "client":
            pass
    if system.kind != "client":
        # Raspberry Pi's firmware switches the memory cgroup off, with which the service's limit would be ignored.
        tokens["cgroup_enable"] = "memory"
    switches["cmdline.txt"] = command_line(line, tokens).encode(errors="surrogateescape")
    boot.write(switches)


def folder(settings: CardSettings, *, now: float, card: bool = True) -> Files:
    """The folder's files that are one device's own; with ``card`` its name, network and keys too."""
    version = importlib.metadata.version("fedge")
    day = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now))
    files: Files = {f"{FOLDER}/version": f"fedge {version}\nwritten {int(now)} ({day} UTC)\n".encode()}
    if card:
        files[f"{FOLDER}/card.toml"] = settings.card_toml.encode()
    if settings.claim is not None:
        files[CLAIM] = settings.claim
    # The last one: where it is, the folder is whole.
    files[f"{FOLDER}/device.toml"] = settings.device_toml.encode()
    return files


def command_line(line: str, tokens: Mapping[str, str]) -> str:
    """The kernel's command line with settings, in the place of others of their names; always one line."""
    kept = [word for word in line.split() if word.partition("=")[0] not in tokens]
    return " ".join([*kept, *(f"{name}={value}" for name, value in tokens.items())]) + "\n"


def _program(wheels: Mapping[str, Path]) -> Files:
    """What installs the client on a system that has none."""
    ours = importlib.resources.files("deploy")
    files: Files = {f"{FOLDER}/install.sh": ours.joinpath("firstboot", "install.sh").read_bytes()}
    for name in ("firstboot.py", "enroll.py"):
        files[f"{FOLDER}/lib/{name}"] = ours.joinpath("firstboot", name).read_bytes()
    for unit in sorted(ours.joinpath("systemd").iterdir(), key=lambda unit: unit.name):
        if unit.name != _NOT_A_DEVICES and re.fullmatch(r"fedge-[a-z-]+\.(service|path|timer|socket)", unit.name):
            files[f"{FOLDER}/units/{unit.name}"] = unit.read_bytes()
    for name in ("sysusers.d", "tmpfiles.d", "journald.conf.d"):
        files[f"{FOLDER}/{name}/fedge.conf"] = ours.joinpath(name, "fedge.conf").read_bytes()
    return files | {f"{FOLDER}/wheels/{name}": path for name, path in wheels.items()}


def _firstrun(settings: CardSettings) -> bytes:
    text = importlib.resources.files("deploy").joinpath("firstboot", "firstrun.sh").read_text()
    return text.replace("@USER@", settings.user).encode()


def _user_data(settings: CardSettings) -> bytes:
    """https://docs.cloud-init.io/en/latest/reference/modules.html, and Raspberry Pi OS's ``enable_ssh``."""
    lines = ["#cloud-config", OURS, f"hostname: {quoted(settings.name)}", "manage_etc_hosts: true"]
    lines += ["ssh_pwauth: false", "users:", f"- name: {quoted(settings.user)}", f"  groups: {_GROUPS}"]
    lines += ["  shell: /bin/bash", "  lock_passwd: true"]
    if settings.ssh_keys:
        lines += ['  sudo: "ALL=(ALL) NOPASSWD:ALL"', "  ssh_authorized_keys:"]
        lines += [f"  - {quoted(key)}" for key in settings.ssh_keys]
        lines += ["enable_ssh: true"]
    lines += ["runcmd:", f"- [sh, {_MOUNT}/install.sh, now]"]
    # That is said to be done before it is begun: what a power cut has ended is gone on with at each boot.
    begun = f"[ ! -e {_WHOLE} ] && ls {_BEGUN} >/dev/null 2>&1"
    lines += ["bootcmd:", f"- [sh, -c, {quoted(f'if {begun}; then sh {_MOUNT}/install.sh now; fi')}]"]
    return ("\n".join(lines) + "\n").encode()


def _network_config(wifi: Wifi) -> bytes:
    """https://netplan.readthedocs.io/en/stable/netplan-yaml/; a password of 64 hex digits is the key itself."""
    lines = [OURS, "network:", "  version: 2", "  ethernets:", "    eth0: {dhcp4: true, optional: true}", "  wifis:"]
    lines += ["    wlan0:", "      dhcp4: true", "      optional: true"]
    lines += [f"      regulatory-domain: {quoted(wifi.country)}", "      access-points:"]
    point = f"{{password: {quoted(wifi.key)}}}" if wifi.key else "{}"
    lines += [f"        {quoted(wifi.ssid)}: {point}"]
    return ("\n".join(lines) + "\n").encode()


def _preseed(settings: CardSettings) -> bytes:
    """The rpi-preseed.toml(5) of Raspberry Pi's rpi-preseed."""
    lines = [OURS, 'config_version = "1.0"', "", "[system]", f"hostname = {quoted(settings.name)}", ""]
    lines += ["[user]", f"name = {quoted(settings.user)}"]
    if settings.ssh_keys:
        keys = ", ".join(map(quoted, settings.ssh_keys))
        lines += ["passwordless_sudo = true", "", "[ssh]", "enabled = true", "password_authentication = false"]
        lines += [f"authorized_keys = [{keys}]"]
    if settings.wifi is not None:
        wifi = settings.wifi
        lines += ["", "[wlan]", f"ssid = {quoted(wifi.ssid)}", f"country = {quoted(wifi.country)}"]
        if wifi.key:
            lines += [f"password = {quoted(wifi.key)}", "password_encrypted = true", 'key_mgmt = "wpa-psk"']
    # Its unit is given 30 seconds; what takes longer is the service that this only starts.
    lines += ["", "[runcmd]", f'early = ["sh {_MOUNT}/install.sh now"]', "early_cmd_timeout = 25"]
    return ("\n".join(lines) + "\n").encode()

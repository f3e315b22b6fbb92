"""Small images of the layout of Raspberry Pi OS: a partition table, a FAT boot partition, an ext4 root partition."""

import base64
import hashlib
import shutil
import subprocess
import tempfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

MIB = 1 << 20
BOOT, ROOT = (1, 40), (41, 8)
"""Where the partitions begin, and how large they are, in MiB: FAT32 is at least 32 large."""
COMMAND_LINE = "console=serial0,115200 console=tty1 root=PARTUUID=0000-02 rootfstype=ext4 fsck.repair=yes rootwait\n"
PLACES = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"
TOOLS = {"sfdisk": "fdisk", "mkfs.vfat": "dosfstools", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "mcopy": "mtools"}
LACKING = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=PLACES) is None})
needs_tools = pytest.mark.skipif(bool(LACKING), reason=f"needs the Debian packages {' '.join(LACKING)}")

KINDS = {
    "firstrun": ({}, ("usr/lib/raspberrypi-sys-mods/imager_custom",), "12 (bookworm)", "3.11"),
    "cloud-init": (
        {"user-data": "#cloud-config\n# nothing yet\n", "meta-data": "dsmode: local\ninstance_id: rpios-image\n"},
        ("usr/lib/raspberrypi-sys-mods/imager_custom", "usr/bin/cloud-init"),
        "13 (trixie)",
        "3.13",
    ),
    "preseed": ({}, ("usr/lib/raspberrypi-sys-mods/imager_custom", "usr/bin/rpi-preseed"), "13 (trixie)", "3.13"),
    "client": ({}, ("opt/fedge/current",), "13 (trixie)", "3.13"),
}
"""By kind: files of the boot partition, files of the root partition, Debian's version, Python's version."""
ELF = {"arm64": (2, 0xB7), "armhf": (1, 0x28), "amd64": (2, 0x3E)}


def run(*command, given=None):
    """Run a program that may be an administrator's."""
    tool = shutil.which(command[0], path=PLACES)
    assert tool is not None, command[0]
    return subprocess.run([tool, *map(str, command[1:])], input=given, capture_output=True, check=True).stdout


def card(path, kind, *, machine="arm64", system="debian", boot=None, root=(), python=None, label="dos"):
    """Write a card's image of a kind of customisation."""
    folder = path.parent / f"{path.name}.d"
    files, programs, version, own = KINDS[kind]
    python = python or own
    wide, number = ELF[machine]
    contents = {
        "usr/lib/os-release": f'PRETTY_NAME="Debian GNU/Linux {version}"\nID={system}\n',
        f"usr/bin/python{python}": bytes([0x7F, *b"ELF", wide]) + bytes(13) + number.to_bytes(2, "little") + bytes(40),
    }
    for name, content in (contents | dict.fromkeys((*programs, *root), "")).items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "usr/bin/python3").symlink_to(f"python{python}")
    with path.open("wb") as file:
        file.truncate((ROOT[0] + ROOT[1] + 1) * MIB)
    types = {
        "dos": ("c", "83"),
        "gpt": ("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"),
    }
    lines = [f"label: {label}"]
    lines += [
        f"start={start * 2048}, size={size * 2048}, type={kind}"
        for (start, size), kind in zip((BOOT, ROOT), types[label], strict=True)
    ]
    run("sfdisk", "-q", path, given="\n".join(lines).encode())
    run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-d",
        folder,
        "-E",
        f"offset={ROOT[0] * MIB}",
        path,
        f"{ROOT[1]}M",
    )
    shutil.rmtree(folder)
    run("mkfs.vfat", "-F", "32", "-n", "BOOTFS", "--offset", BOOT[0] * 2048, path, BOOT[1] * 1024)
    fat = path.parent / f"{path.name}.boot"
    fat.mkdir()
    for name, text in ({"cmdline.txt": COMMAND_LINE, "config.txt": "arm_64bit=1\n"} | files | (boot or {})).items():
        (fat / name).write_text(text)
    run("mcopy", "-o", "-i", f"{path}@@{BOOT[0] * MIB}", *fat.iterdir(), "::")
    shutil.rmtree(fat)
    return path


def boot_files(path):
    """All files of a card's boot partition by their paths, read without mounting it."""
    with tempfile.TemporaryDirectory() as name:
        run("mcopy", "-s", "-i", f"{path}@@{BOOT[0] * MIB}", "::*", name)
        return {str(file.relative_to(name)): file.read_bytes() for file in Path(name).rglob("*") if file.is_file()}


def wheel(folder, name, version="1.0", tag="py3-none-any", needs=(), modules=None, programs=""):
    """Write a small wheel."""
    info = f"{name}-{version}.dist-info"
    files = {f"{name}/{file}": text for file, text in (modules or {"__init__.py": ""}).items()}
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {one}" for one in needs)]
    files[f"{info}/METADATA"] = "\n".join(lines) + "\n"
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    files[f"{info}/entry_points.txt"] = programs
    rows = []
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{file},sha256={digest},{len(text.encode())}")
    path = Path(folder) / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{info}/RECORD": "\n".join([*rows, f"{info}/RECORD,,", ""])}).items():
            archive.writestr(file, text)
    return path


def index(folder, tags=("cp311-cp311", "cp313-cp313"), leave_out=()):
    """A folder that stands for pip's index: small wheels for aarch64 of all that fedge requires on a device."""
    folder.mkdir(exist_ok=True)
    for line in requires("fedge") or ():
        one = Requirement(line)
        if (one.marker is None or one.marker.evaluate({"extra": ""})) and one.name not in leave_out:
            for tag in tags:
                wheel(folder, one.name.replace("-", "_"), "99.0", f"{tag}-manylinux_2_28_aarch64")
    return folder

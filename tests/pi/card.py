"""What a test adds to a card's root, and reads from it afterwards: through debugfs, without mounting it."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.image.card import BOOT_START, ROOT_START

GUEST = Path(__file__).parent / "guest"
_TEST = "/usr/local/lib/fedge-test"
_PIECE = 1 << 20
_UNITS = "/etc/systemd/system"
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def additions(*, clock: bool) -> dict[str, Path]:
    """What a test's guest has beside the card's own; ``clock``: whether its clock passes for one that was set."""
    found = {
        f"{_TEST}/probe.sh": GUEST / "probe.sh",
        f"{_TEST}/sitecustomize.py": GUEST / "sitecustomize.py",
        f"{_TEST}/journal.py": GUEST.parent.parent / "kills" / "journal.py",
        f"{_UNITS}/fedge-probe.service": GUEST / "fedge-probe.service",
        f"{_UNITS}/fedge-client.service.d/test.conf": GUEST / "client.conf",
    }
    return found | ({"/etc/tmpfiles.d/fedge-test.conf": GUEST / "clock.conf"} if clock else {})


def put_in_root(image: Path, files: Mapping[str, Path]) -> None:
    """Write files into the root file system; folders that lead there come by themselves, units are on."""
    lines: list[str] = []
    folders = {"/"}
    for place, source in files.items():
        switch = f"{_UNITS}/multi-user.target.wants/{Path(place).name}"
        unit = place.startswith(_UNITS) and place.endswith(".service")
        for folder in [*reversed(Path(place).parents), *(reversed(Path(switch).parents) if unit else [])]:
            if str(folder) not in folders:
                folders.add(str(folder))
                # It may be there: debugfs says so and goes on.
                lines.append(f'mkdir "{folder}"')
        lines += [f'write "{source.absolute()}" "{place}"', f'sif "{place}" mode 0100644']
        lines += [f'symlink "{switch}" "{place}"'] if unit else []
    _debugfs(f"{image}?offset={ROOT_START}", lines, write=True)


def put_on_boot(image: Path, files: Mapping[str, bytes], scratch: Path) -> None:
    """Write files into the folder ``fedge`` of the boot partition."""
    folder = scratch / "fedge"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    subprocess.run(["mcopy", "-s", "-o", "-i", f"{image}@@{BOOT_START}", str(folder), "::"], check=True)


def listed_on_boot(image: Path) -> list[str]:
    """Names in the folder ``fedge`` of the boot partition."""
    command = ["mdir", "-b", "-i", f"{image}@@{BOOT_START}", "::fedge"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.rpartition("/")[2] for line in told.split() if not line.endswith("/")]


def take_from_root(image: Path, place: str, folder: Path) -> None:
    """Copy a folder of the root to this machine, once its file system is put right as the next boot would."""
    folder.mkdir(parents=True, exist_ok=True)
    # e2fsck opens what it has changed once more, and knows of no offset then.
    copy = folder / "root.ext4"
    size = f"bs={_PIECE}"
    command = ["dd", f"if={image}", f"of={copy}", size, f"skip={ROOT_START // _PIECE}", "conv=sparse", "status=none"]
    subprocess.run(command, check=True)
    done = subprocess.run(["e2fsck", "-p", "-f", str(copy)], capture_output=True, text=True, env={"PATH": _PATH})
    # 1 is: there was something to do, and it is done.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    _debugfs(str(copy), [f'rdump "{place}" "{folder.absolute()}"'])
    copy.unlink()


def _debugfs(disk: str, lines: Sequence[str], *, write: bool = False) -> None:
    command = ["debugfs", *(["-w"] if write else []), "-f", "-", disk]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", check=True, capture_output=True, text=True, env={"PATH": _PATH}
    )
    told = [line for line in done.stderr.splitlines()[1:] if "File exists" not in line and "ext2_file_type" not in line]
    told = [line for line in told if "Ext2 directory already exists" not in line]
    assert not told, "\n".join(told)

"""Installs a release of the client, watches it, and goes back to the one before where it does not prove itself.

A program of its own, with nothing but Python's standard library: it is copied to the device once, as root's, and is no
part of any release, so that it works whatever is wrong with one. It runs as root (`fedge-update.service`), woken by
what the client stages, and at each start of the device. What the client has staged is copied first and judged after
that, by the federation's key in ``trust.json``, which comes from the claim on the card.

Every step can be cut off: ``journal.json`` says which one was under way, it is written before anything that it says is
done, and done again at the next start. ``current`` always leads to a release that is whole.
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from deploy.update.machine import Machine, RefusedError

SIGNED_LIMIT, WHEEL_LIMIT = 64 * 1024, 256 * 2**20
MARK = ".whole"
"""Is written into a release's folder last, when all of it is on the medium; the first boot writes an empty one."""
_BLOCK = 2**20
_TOGETHER = 3
"""Releases that are judged in one run at most."""
_BOOTS = 3
"""Starts of the device in which a release on trial may prove itself: one that takes the device down must go too."""
_RESTARTS = 5
"""Times that a client on trial may end by itself."""


@dataclass(frozen=True)
class Journal:
    """What is under way: nothing (idle), a release on trial, or the way back from one."""

    phase: str = "idle"
    version: str = ""
    record: str = ""
    issued: float = 0.0
    token: str = ""
    previous: str = ""
    """The release that a way back leads to."""
    before: str = ""
    """What was ``previous`` before the trial."""
    boots: int = 0
    reason: str = ""
    newest: float = 0.0
    """When the newest release was issued that has proved itself: no older one is taken."""
    seen: str = ""
    """SHA-256 of the staged file that was judged last."""
    pins: tuple[str, ...] = ()
    """Keys that are believed once the release has proved itself."""


@dataclass
class Updater:
    """One device's; everything is below ``root``."""

    root: Path
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        self.base = self.root / "opt" / "fedge"
        self._incoming = self.base / "incoming"
        self._journal = self._read()

    def run(self) -> None:
        """Go on with what was under way, then see whether a release waits."""
        os.umask(0o022)
        if self._journal.phase == "trial":
            self._note(replace(self._journal, boots=self._journal.boots + 1))
            self._try()
        elif self._journal.phase == "back":
            self._return(self._journal.reason)
        # Another one may be staged meanwhile, of which systemd says nothing while this runs.
        for _ in range(_TOGETHER):
            staged = self._copied("release.signed", SIGNED_LIMIT)
            if staged is None:
                break
            name = hashlib.sha256(staged.read_bytes()).hexdigest()
            if name == self._journal.seen:
                break
            self._judge(staged, name)

    # From what is staged to a trial.

    def _judge(self, staged: Path, name: str) -> None:
        found: dict[str, Any] = {"record": name, "version": ""}
        try:
            found |= self._admitted(staged)
            if found["error"]:
                raise RefusedError(found["error"])
            self._report(found["record"], found["version"], "staged", "being installed")
            self._install(found)
        except (RefusedError, OSError, ValueError, LookupError, TypeError) as error:
            # The last three: what judges says something else than an answer.
            self.machine.log(f"release {found['version']} is not installed: {error}")
            self._report(found["record"], found["version"], "refused", str(error))
            self._note(replace(self._journal, seen=name))
            self._swept()
            return
        trial = Journal(
            phase="trial",
            version=found["version"],
            record=found["record"],
            issued=found["issued"],
            token=secrets.token_hex(8),
            previous=self._led("current"),
            before=self._led("previous"),
            newest=self._journal.newest,
            seen=name,
            pins=tuple(found["pins"]),
        )
        self._note(trial)
        self._swept()
        self._try()

    def _admitted(self, staged: Path) -> dict[str, Any]:
        trust = json.loads((self.base / "trust.json").read_text(encoding="ascii"))
        question = {
            "signed": str(staged),
            "federation": trust["federation"],
            "pins": trust["pins"],
            "platform": self.machine.tag,
            "running": self._led("current"),
            "newest": self._journal.newest,
            "now": self.machine.wall(),
        }
        return self.machine.judge(self.base / "current", question)

    def _install(self, found: dict[str, Any]) -> None:
        """Have a whole release in its folder."""
        version = found["version"]
        folder = self.base / "releases" / version
        if self._led("current") == version:
            raise RefusedError("it is installed already")
        wheels = [self._wheel(name, sha256, size) for name, sha256, size in found["files"]]
        if _made(folder).get("record") == found["record"]:
            return
        links = self._incoming / "links"
        for path in (folder, links):
            shutil.rmtree(path, ignore_errors=True)
        links.mkdir(parents=True)
        for wheel in wheels:
            os.link(wheel, links / wheel.name)
        self.machine.log(f"release {version}: installing")
        try:
            self.machine.build(folder, links, version)
            if (said := self.machine.probe(folder)) != version:
                raise RefusedError(f"its wheels say that they are version {said}; the release says {version}")
        except RefusedError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.sync()
        kept = {"record": found["record"], "wheels": [sha256 for _, sha256, _ in found["files"]]}
        write(folder / MARK, json.dumps(kept))

    def _wheel(self, name: str, sha256: str, size: int) -> Path:
        """A wheel in root's own folder: from an earlier release, or from what is staged."""
        path = self.base / "wheels" / sha256 / name
        if path.exists():
            return path
        copied = self._copied(f"{sha256}.whl", min(size, WHEEL_LIMIT))
        if copied is None:
            raise RefusedError(f"{name} is not there")
        with copied.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(_BLOCK):
                found.update(block)
        if found.hexdigest() != sha256:
            raise RefusedError(f"{name} is not the file that was signed")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(copied, path)
        return path

    # A trial.

    def _try(self) -> None:
        """Put the release in place, and see whether it hears the server."""
        trial = self._journal
        if trial.boots > _BOOTS:
            self._return(f"the device was started {trial.boots} times and it has not heard the server")
            return
        self._report(trial.record, trial.version, "trial", token=trial.token)
        self._lead("previous", trial.previous)
        self._lead("current", trial.version)
        self.machine.log(f"release {trial.version}: on trial")
        self.machine.restart()
        end = self.machine.now() + self.machine.patience
        while self.machine.now() < end:
            if self._alive() == f"{trial.version} {trial.token}":
                self._keep()
                return
            if (ended := self.machine.restarts()) >= _RESTARTS:
                self._return(f"the new client ended {ended} times by itself")
                return
            self.machine.sleep(1.0)
        self._return(f"the new client has not heard the server within {self.machine.patience:.0f} s")

    def _alive(self) -> str:
        file = self._staged("alive", 256)
        if file is None:
            return ""
        with file:
            return file.read(256).decode("ascii", errors="replace").strip()

    def _keep(self) -> None:
        """The release has proved itself."""
        trial = self._journal
        if trial.pins:
            trust = json.loads((self.base / "trust.json").read_text(encoding="ascii"))
            write(self.base / "trust.json", json.dumps(trust | {"pins": trial.pins}))
        # Before the journal forgets the trial: cut off in between, it is gone through once more.
        self._report(trial.record, trial.version, "healthy")
        self._note(Journal(newest=max(trial.newest, trial.issued), seen=trial.seen))
        self.machine.log(f"release {trial.version}: has heard the server, and stays")
        self._prune()

    def _return(self, reason: str) -> None:
        """Put back what was there before."""
        trial = replace(self._journal, phase="back", reason=reason)
        self._note(trial)
        self._lead("current", trial.previous)
        if trial.before and (self.base / "releases" / trial.before).exists():
            self._lead("previous", trial.before)
        self.machine.restart()
        self._report(trial.record, trial.version, "back", reason)
        self.machine.log(f"release {trial.version}: back to {trial.previous}: {reason}")
        self._note(Journal(newest=trial.newest, seen=trial.seen))
        self._prune()

    def _prune(self) -> None:
        """Remove releases that nothing leads to, and wheels of which there is none any more."""
        kept = {self._led("current"), self._led("previous")}
        wheels: set[str] = set()
        for folder in _entries(self.base / "releases"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                wheels.update(_made(folder).get("wheels", ()))
        for folder in _entries(self.base / "wheels"):
            if wheels and folder.name not in wheels:
                shutil.rmtree(folder, ignore_errors=True)

    # Files.

    def _staged(self, name: str, limit: int) -> BinaryIO | None:
        """A file that the client has staged, to be closed; None where there is none.

        The folders above it are the client's user's too: no link in them is followed, and nothing but a file is read.
        """
        folder = os.open(self.root / "var" / "lib" / "fedge", os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in ("state", "release"):
                above, folder = folder, os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(above)
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError:
            return None
        finally:
            os.close(folder)
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            os.close(source)
            return None
        return open(source, "rb")

    def _copied(self, name: str, limit: int) -> Path | None:
        """A copy, root's, of a file that the client has staged; None where there is none."""
        file = self._staged(name, limit)
        if file is None:
            return None
        with file:
            self._incoming.mkdir(parents=True, exist_ok=True)
            target, left = self._incoming / name, limit
            with target.open("wb") as copy:
                while left > 0 and (block := file.read(min(left, _BLOCK))):
                    left -= copy.write(block)
                copy.flush()
                os.fsync(copy.fileno())
        return target

    def _swept(self) -> None:
        shutil.rmtree(self._incoming, ignore_errors=True)

    def _led(self, name: str) -> str:
        """The version that a name leads to."""
        link = self.base / name
        return os.path.basename(os.readlink(link)) if link.is_symlink() else ""

    def _lead(self, name: str, version: str) -> None:
        """Have a name lead to a release, in one step."""
        link, new = self.base / name, self.base / f"{name}.new"
        if self._led(name) == version:
            return
        new.unlink(missing_ok=True)
        os.symlink(f"releases/{version}", new)
        os.replace(new, link)
        _settle(self.base)

    def _report(self, record: str, version: str, stage: str, detail: str = "", token: str = "") -> None:
        said = {"record": record, "version": version, "stage": stage, "detail": detail[:500], "token": token}
        write(self.base / "report.json", json.dumps(said))

    def _note(self, journal: Journal) -> None:
        write(self.base / "journal.json", json.dumps(asdict(journal)))
        self._journal = journal

    def _read(self) -> Journal:
        try:
            found = json.loads((self.base / "journal.json").read_text(encoding="ascii"))
        except FileNotFoundError:
            return Journal()
        return Journal(**found | {"pins": tuple(found["pins"])})


def _made(folder: Path) -> dict[str, Any]:
    """What a release was made from; nothing where it is not whole, or was not made here."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found: dict[str, Any] = json.loads((folder / MARK).read_text(encoding="ascii"))
        return found
    return {}


def _entries(folder: Path) -> Iterable[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else ()


def write(path: Path, text: str) -> None:
    """Replace a file in one step; it is on the medium when this returns, and everybody may read it."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.chmod(0o644)
    os.replace(new, path)
    _settle(path.parent)


def _settle(folder: Path) -> None:
    found = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(found)
    finally:
        os.close(found)


def main() -> None:
    """The program that ``python3 -I /opt/fedge/update`` is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("/"), help="where opt and var are")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds a new client has to hear the server")
    parser.add_argument("--user", default=Machine.user, help="whose rights a new client is tried with")
    parser.add_argument("--judge-user", default=Machine.judge_user, help="whose rights a release is judged with")
    parser.add_argument("--systemctl", default=Machine.systemctl, help="what starts the client anew")
    said = parser.parse_args()
    Updater(
        said.root, Machine(said.patience, user=said.user, judge_user=said.judge_user, systemctl=said.systemctl)
    ).run()


if __name__ == "__main__":
    main()

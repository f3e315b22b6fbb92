"""A device's privileged part in a scratch root: tiny wheels, a machine whose client does as the test says."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from deploy.update import admission
from deploy.update.machine import Machine, RefusedError
from deploy.update.updater import Updater
from edge_client.trust.keys import SigningKey
from edge_client.trust.release import File, Record, here, seal
from edge_client.wire import messages as m
from edge_client.wire import transfer

NOW = 1_800_000_000.0
DAY = 86_400.0
FEDERATION = "toys"
GOOD = "VERSION = {version!r}\n"
BROKEN = "import a_library_that_is_not_there\n"


def wheel(folder: Path, version: str, *, code: str = GOOD, name: str = "fedge") -> Path:
    """A wheel of a client that can be imported, as far as ``code`` lets it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}-{version}.dist-info"
    package = "edge_client" if name == "fedge" else name
    files = {
        f"{package}/__init__.py": "",
        f"{package}/cli.py": "",
        f"{package}/device.py": code.format(version=version),
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{one},,\n" for one in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for one, text in files.items():
            archive.writestr(zipfile.ZipInfo(one), text)
    return path


def record(*wheels: Path, version: str, **more: object) -> Record:
    """What is signed of these wheels."""
    files = tuple(File(one.name, transfer.refer(one.read_bytes(), chunk=1024, inline=0)) for one in wheels)
    about = {"issued": NOW, "expires": NOW + 30 * DAY} | more
    return Record(1, FEDERATION, version, files=files, **about)  # type: ignore[arg-type]


@dataclass
class Client(Machine):
    """A machine on which time flies, and whose client says what it is to say when it is started."""

    root: Path = Path("/")
    hears: bool = True
    """Whether the client that is started hears the server."""
    ends: int = 0
    """How often it ends by itself."""
    time: float = 0.0
    started: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now, self.wall, self.sleep, self.log = lambda: self.time, lambda: NOW + 60, self.wait, self.lines.append
        self.tag = here()

    def wait(self, seconds: float) -> None:
        self.time += seconds

    def judge(self, current, question):
        assert (current / "client").exists(), "only a client that is whole can judge"
        return msgspec.to_builtins(admission.answer(msgspec.convert(question, admission.Question)))

    def build(self, folder, links, version):
        folder.mkdir(parents=True)
        with zipfile.ZipFile(links / f"fedge-{version}-py3-none-any.whl") as archive:
            (folder / "client").write_bytes(archive.read("edge_client/device.py"))

    def probe(self, folder):
        said: dict[str, str] = {}
        try:
            exec((folder / "client").read_text(), said)
        except ImportError as error:
            raise RefusedError(f"the new client does not start: {error}") from error
        return said["VERSION"]

    def restart(self):
        current = self.root / "opt" / "fedge" / "current"
        self.started.append(self.probe(current))
        report = json.loads((self.root / "opt" / "fedge" / "report.json").read_text())
        if self.hears and report["stage"] == "trial" and report["version"] == self.started[-1]:
            stage(self.root, "alive", f"{report['version']} {report['token']}\n".encode())

    def restarts(self):
        return self.ends


def stage(root: Path, name: str, data: bytes) -> Path:
    """What the client's user writes."""
    folder = root / "var" / "lib" / "fedge" / "state" / "release"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


@dataclass
class Device:
    """A device that runs 0.1.0."""

    root: Path
    key: SigningKey = field(default_factory=SigningKey.generate)
    machine: Client = field(init=False)

    def __post_init__(self) -> None:
        self.machine = Client(root=self.root)
        self.base = self.root / "opt" / "fedge"
        first = self.base / "releases" / "0.1.0"
        first.mkdir(parents=True)
        (self.root / "var" / "lib" / "fedge").mkdir(parents=True)
        (first / "client").write_text(GOOD.format(version="0.1.0"))
        (self.base / "current").symlink_to("releases/0.1.0")
        trust = {"federation": FEDERATION, "pins": [self.key.public.hex()]}
        (self.base / "trust.json").write_text(json.dumps(trust))

    def staged(self, said: Record, *wheels: Path, key: SigningKey | None = None) -> m.Release:
        """Leave a release there as a client does."""
        release = seal(said, (key or self.key).sign)
        for file, path in zip(said.files, wheels, strict=True):
            stage(self.root, f"{file.blob.sha256.hex()}.whl", path.read_bytes())
        stage(self.root, "release.signed", msgspec.msgpack.encode(release))
        return release

    def update(self) -> dict[str, str]:
        """Run the updater; what it reports."""
        Updater(self.root, self.machine).run()
        return self.report

    @property
    def report(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.base / "report.json").read_text())
        return found

    @property
    def runs(self) -> str:
        """The version that ``current`` leads to, which has to be whole."""
        said: dict[str, str] = {}
        exec((self.base / "current" / "client").read_text(), said)
        return said["VERSION"]

"""What a device must not forget across a power cut: its bundle, its copy of the model, its residual, an unsent update.

Everything is a file in one folder. Files that hold data are written first, under names that nothing refers to yet; then
the index is replaced in one atomic rename. A power cut leaves the old index or the new one, and files of ours that no
index names are removed at the next start. Files of others stay: the folder may be anybody's.
"""

import contextlib
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from edge_client.codec.layout import Layout
from edge_client.codec.model import Model, pack_model, unpack_model
from edge_client.errors import CodecError, StoreError
from edge_client.held import BLOB_LIMIT, NO_HASH, Held
from edge_client.partial import PartialBlob
from edge_client.upload import Pending
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import Assembly

WITNESS = "witness.msgpack"
"""What a device that is enrolled remembers of what it has believed; it is not this store's (`trust.witness`)."""
_INDEX = "index.msgpack"
_SCHEMA = 1
_OURS = re.compile(
    r"(index\.msgpack|(update|residual|memory-[a-z]{1,16})-[0-9]+\.bin|model-[0-9a-f]{64}\.bin"
    r"|bundle-[0-9a-f]{64}\.fedge)(\.new)?\Z"
)


class _Schema(msgspec.Struct, frozen=True):
    schema: int


class _Last(msgspec.Struct, frozen=True):
    epoch: int
    task: int
    update: str
    before: str
    after: str
    settled: bool = False
    memories: dict[str, tuple[str, str]] = {}
    """By name, the files of what settles with the update: before it, and if it is recorded."""


class _Index(msgspec.Struct, frozen=True):
    schema: int = _SCHEMA
    bundle: bytes = NO_HASH
    version: int = 0
    digest: bytes = NO_HASH
    residual: str = ""
    last: _Last | None = None
    serial: int = 0
    memories: dict[str, str] = {}
    """By name, the file of what the device remembers. A client that does not know this field forgets them."""

    def files(self) -> set[str]:
        """Names in the client's folder that this index refers to."""
        named = {_INDEX, _model_file(self.digest), _bundle_file(self.bundle), self.residual, *self.memories.values()}
        if self.last is not None:
            named |= {self.last.update, self.last.before, self.last.after}
            named.update(*self.last.memories.values())
        return named - {""}


class ModelCopies(Protocol):
    """Where a client's copy of the global model rests between tasks, by the model's digest."""

    def load(self, digest: bytes, layout: Layout) -> Model | None:
        """The copy with that digest, None when there is none."""

    def save(self, digest: bytes, model: Model, replaces: bytes) -> None:
        """Keep ``model``; the copy that it replaces is not needed any more."""


class FileCopies:
    """The one copy of the model that a device holds, in its store's folder; ``wrote`` as in `Store`."""

    def __init__(self, folder: Path, *, wrote: Callable[[int], None] = lambda _: None) -> None:
        self._folder = folder
        self._wrote = wrote

    def load(self, digest: bytes, layout: Layout) -> Model | None:
        """Read the copy; one that is cut off counts as none, other damage shows when the model is used."""
        try:
            return unpack_model(self._path(digest).read_bytes(), layout)
        except (OSError, CodecError):
            return None

    def save(self, digest: bytes, model: Model, replaces: bytes) -> None:
        """Write the new copy beside the old one, which the store removes once its index names the new one."""
        data = pack_model(model)
        _write(self._path(digest), data, durable=True)
        self._wrote(len(data))

    def _path(self, digest: bytes) -> Path:
        return self._folder / _model_file(digest)


class Store:
    """One client's durable state in ``folder``.

    ``durable=False`` skips fsync, for emulated phones, whose host does not lose power one phone at a time. ``bundles``
    is the folder of bundles, where several clients of one machine share it. ``wrote`` is told the size of each
    file that was written, and of each chunk. Calls may come from several threads.

    Raises:
        StoreError: the folder cannot be used, or its index is damaged or of a newer fedge.
    """

    def __init__(
        self,
        folder: Path,
        *,
        durable: bool = True,
        bundles: Path | None = None,
        wrote: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._wrote = wrote
        self._durable = durable
        self._bundles = bundles or folder
        self._lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._bundles.mkdir(parents=True, exist_ok=True)
            self._index = self._read()
            self._sweep()
            self._download = PartialBlob(folder / "download.part", limit=BLOB_LIMIT, durable=durable)
        except OSError as error:
            raise StoreError(f"state folder {folder}: {error.strerror or error}; it must be writable") from error

    @property
    def folder(self) -> Path:
        """Where the state lies."""
        return self._folder

    def held(self) -> Held:
        """What the session starts from."""
        index, pending = self._index, None
        if index.last is not None and not index.last.settled:
            update = self._load(index.last.update)
            if update is not None:
                pending = Pending(index.last.epoch, index.last.task, update)
        return Held(index.bundle, index.version, index.digest, pending)

    def install(self, digest: bytes, bundle: bytes) -> None:
        """Store a bundle; what belonged to another one is forgotten.

        The same one again, where its file was damaged, takes the copy of the model alone: what a device remembers it
        could learn from nobody.
        """
        path = self._bundles / _bundle_file(digest)
        with self._lock:
            if self._bundles == self._folder or not path.exists():
                self._save(path, bundle)
            same = digest == self._index.bundle
            known = self._index if same else _Index(bundle=digest, serial=self._index.serial)
            self._commit(msgspec.structs.replace(known, version=0, digest=NO_HASH))

    def bundle(self) -> bytes | None:
        """The stored bundle's bytes, None when there is none."""
        if self._index.bundle == NO_HASH:
            return None
        try:
            return (self._bundles / _bundle_file(self._index.bundle)).read_bytes()
        except OSError:
            return None

    def residual(self) -> bytes | None:
        """What earlier encodings left over, packed; None when there is nothing."""
        with self._lock:  # settling removes the file of the one that it replaces
            return self._load(self._index.residual) if self._index.residual else None

    def recall(self, name: str) -> bytes | None:
        """What the device remembers under ``name``; None when there is nothing."""
        with self._lock:
            file = self._index.memories.get(name)
            return self._load(file) if file else None

    def partial(self) -> Assembly | None:
        """The blob that was on its way when the client ended."""
        return self._download.assembly()

    def keep(self, ref: BlobRef, index: int, data: bytes) -> None:
        """Keep a chunk of a blob on its way; one of another blob replaces what there is.

        Raises:
            StoreError: the disk refuses.
        """
        self._download.keep(ref, index, data)
        self._wrote(len(data))

    def discard(self) -> None:
        """Forget the blob that was on its way."""
        self._download.discard()

    def hold(self, version: int, digest: bytes) -> None:
        """The client's copy of the model is now this version."""
        with self._lock:
            self._commit(msgspec.structs.replace(self._index, version=version, digest=digest))

    def commit(
        self,
        epoch: int,
        task: int,
        update: bytes,
        residual: bytes | None,
        *,
        version: int,
        digest: bytes,
        settles: Mapping[str, bytes] | None = None,
        keeps: Mapping[str, bytes] | None = None,
    ) -> None:
        """Store an encoded update and the residual that is to follow if it is recorded, in one step.

        No bytes are no residual. ``residual`` None leaves the one that there is, whatever becomes of the update.

        ``settles`` are memories by name (up to 16 lower-case letters) that follow the update as the residual does;
        ``keeps`` are there from now on, whatever becomes of it. No bytes forget a memory; names that are in neither
        stay as they are.
        """
        with self._lock:
            serial = self._index.serial + 1
            name = self._put(f"update-{serial}.bin", update)
            before = self._index.residual
            after = before if residual is None else self._put(f"residual-{serial}.bin", residual) if residual else ""
            memories = dict(self._index.memories)
            memories |= {key: self._remember(key, serial, data) for key, data in (keeps or {}).items()}
            pairs = {
                key: (memories.get(key, ""), self._remember(key, serial, data)) for key, data in (settles or {}).items()
            }
            last = _Last(epoch, task, name, before, after, memories=pairs)
            self._commit(
                msgspec.structs.replace(
                    self._index, version=version, digest=digest, last=last, serial=serial, memories=memories
                )
            )

    def settle(self, epoch: int, task: int, *, recorded: bool) -> None:
        """The fate of the last update is known; of any other one there is nothing left to settle.

        The first word decides; after it only "recorded" can be taken back, by a task that turns out void.
        """
        with self._lock:
            last = self._index.last
            if last is None or (last.epoch, last.task) != (epoch, task) or (last.settled and recorded):
                return
            kept = last.after if recorded else last.before
            pairs = {key: pair[recorded] for key, pair in last.memories.items()}
            settled = msgspec.structs.replace(last, update="", settled=True)
            self._commit(
                msgspec.structs.replace(
                    self._index, residual=kept, last=settled, memories={**self._index.memories, **pairs}
                )
            )

    def _read(self) -> _Index:
        path = self._folder / _INDEX
        if not path.exists():
            return _Index()
        data = path.read_bytes()
        try:
            schema = msgspec.msgpack.decode(data, type=_Schema).schema
            if schema != _SCHEMA:
                raise StoreError(f"{path} has schema {schema}; this fedge knows {_SCHEMA}: update fedge")
            return msgspec.msgpack.decode(data, type=_Index)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StoreError(f"{path} is damaged ({error}); remove the folder to start this client anew") from error

    def _commit(self, index: _Index) -> None:
        self._save(self._folder / _INDEX, msgspec.msgpack.encode(index))
        # Only what the old index named goes: another thread may be writing files that no index names yet.
        gone, self._index = self._index.files() - index.files(), index
        for name in gone:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()

    def _sweep(self) -> None:
        named = self._index.files()
        for entry in os.scandir(self._folder):
            if entry.name not in named and _OURS.match(entry.name) and entry.is_file():
                os.unlink(entry.path)

    def _remember(self, key: str, serial: int, data: bytes) -> str:
        return self._put(f"memory-{key}-{serial}.bin", data) if data else ""

    def _put(self, name: str, data: bytes) -> str:
        self._save(self._folder / name, data)
        return name

    def _save(self, path: Path, data: bytes) -> None:
        _write(path, data, durable=self._durable)
        self._wrote(len(data))

    def _load(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a state folder; the kernel frees it with this one, however that ends.

    Raises:
        StoreError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"state folder {folder}: {error.strerror or error}; it must be writable") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"state folder {folder} is in use by another client; stop that one, or give this one its own --state"
            ) from error
        yield
    finally:
        os.close(lock)


def _bundle_file(digest: bytes) -> str:
    return f"bundle-{digest.hex()}.fedge"


def _model_file(digest: bytes) -> str:
    return f"model-{digest.hex()}.bin"


def _write(path: Path, data: bytes, *, durable: bool) -> None:
    """Replace a file in one step; with ``durable`` it is on the medium when this returns."""
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error

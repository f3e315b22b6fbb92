"""What must hold after every step, against a second opinion: a reference that follows the run beside the code.

The reference sees what a fly on the wall sees - bytes that clients stored, commits, messages - and computes sums,
versions and residuals anew, in float64, from the clients' own bytes and sample counts.
"""

import hashlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from broker_server.config import Federation
from broker_server.ledger import Ledger
from edge_client.bundle import Bundle
from edge_client.codec.model import unpack_model
from edge_client.codec.update import decode_update
from edge_client.manifest import update_layouts
from edge_client.store import Store
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.transfer import Assembly, count
from tests.faults.broker import SimBroker
from tests.faults.world import World

Identity = tuple[int, int]
Key = tuple[int, int, str]
Floats = npt.NDArray[np.float64]


Rest = tuple[bytes | None, bytes | None]
"""A residual, and what is remembered of a gradient."""
MEMORY = "scaffold"


@dataclass
class Produced:
    """An update that a client encoded: its bytes, and the samples that the client has."""

    data: bytes
    samples: int


@dataclass
class LedgerView:
    """One ledger, as its commits show it."""

    folder: str
    model: Floats
    """Published parameters and what rounding left, of the newest version."""
    velocity: Floats
    digests: dict[int, bytes]
    bits: dict[int, bytes]
    rows: dict[Key, Produced] = field(default_factory=dict)
    outcomes: dict[Identity, str] = field(default_factory=dict)
    counted: dict[Key, int] = field(default_factory=dict)
    variates: Floats | float = 0.0
    """The sum of what clients remember of their gradients, where they do."""
    control: Floats | float = 0.0
    """What goes with the newest version."""
    version: int = 0
    rounds: int = 0
    epoch: int = 0
    last: int = 0


@dataclass
class ClientView:
    """What rests on one client between tasks, by the rules."""

    rests: Rest = (None, None)
    last: Identity | None = None
    before: Rest = (None, None)
    after: Rest = (None, None)
    fate: bool | None = None
    """None: not settled."""
    doubt: tuple["ClientView", ...] = ()
    """What else its disk may say after a power cut in the middle of a write."""


@dataclass
class Kept:
    """Chunks of a blob under way on somebody's disk."""

    ref: m.BlobRef
    chunks: dict[int, bytes] = field(default_factory=dict)
    """Written, or begun to be written."""
    whole: set[int] = field(default_factory=set)
    """Those that are there whatever becomes of the process."""


@dataclass
class Oracle:
    """All invariants of one run."""

    world: World
    settings: Federation
    bundle: Bundle
    samples: Mapping[str, int]
    """By honest client."""
    ledgers: list[LedgerView] = field(default_factory=list)
    clients: dict[str, ClientView] = field(default_factory=dict)
    produced: dict[Key, dict[bytes, Produced]] = field(default_factory=dict)
    receipts: set[Key] = field(default_factory=set)
    kept: dict[Path, Kept] = field(default_factory=dict)
    """By file."""
    denied: set[Key] = field(default_factory=set)
    """What a client was told is not counted, and what it acted upon."""
    lost: int = 0
    doubled: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        self._layouts = update_layouts(self.bundle.manifest)
        self._base = self.bundle.initial()
        self._topics = Topics(self.settings.federation.name)

    # The server's ledger.

    def ledger(self, folder: str) -> LedgerView:
        """The view of one state folder, new where there is none yet."""
        for view in self.ledgers:
            if view.folder == folder:
                return view
        zero = np.zeros(self._base.size)
        first = self._base.astype(np.float64)
        view = LedgerView(folder, first, zero, {}, {0: self._base.tobytes()})
        self.ledgers.append(view)
        return view

    def committed(self, view: LedgerView, connection: sqlite3.Connection) -> None:
        """A transaction is on the disk."""

        def rows(query: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
            return connection.execute(query, values).fetchall()

        if (epoch := rows("SELECT value FROM notes WHERE key = 'epoch'")) and int(epoch[0][0]) != view.epoch:
            if int(epoch[0][0]) < view.epoch:
                self.world.violated(f"epoch {epoch[0][0]} after {view.epoch}")
            view.epoch = int(epoch[0][0])
        for number, epoch, task, client, samples, digest in rows(
            "SELECT id, epoch, task, client, samples, sha256 FROM updates WHERE id > ? ORDER BY id", view.last
        ):
            view.last = number
            self._recorded(view, (epoch, task, client), samples, digest)
        if rows("SELECT count(*) FROM tasks WHERE outcome IS NOT NULL")[0][0] != len(view.outcomes):
            made_of = {}
            for epoch, task, kind, version, outcome in rows(
                "SELECT epoch, task, kind, version, outcome FROM tasks WHERE outcome IS NOT NULL"
            ):
                if (epoch, task) not in view.outcomes:
                    view.outcomes[epoch, task] = outcome
                    if outcome == "done" and kind == "train":
                        made_of[epoch, task] = version
            if made_of:
                self._advanced(view, made_of, rows)
        found = rows("SELECT max(version) FROM versions")[0][0] or 0
        if found != view.version:
            self.world.violated(f"version {found} is in the ledger and {view.version} is what closed tasks make")
        finished = rows("SELECT count(*) FROM rounds WHERE finished")[0][0]
        if finished < view.rounds:
            self.world.violated(f"{finished} rounds after {view.rounds}")
        self.rounds += finished - view.rounds
        view.rounds = finished

    def _recorded(self, view: LedgerView, key: Key, samples: int, digest: bytes) -> None:
        if key in view.rows:
            self.doubled += 1
            self.world.violated(f"the update {key} is recorded twice")
        known = self.produced.get(key, {}).get(digest)
        if known is None:
            self.world.violated(f"the update {key} is recorded and its client never made it")
            return
        if known.samples != samples:
            self.world.violated(f"the update {key} weighs {samples} samples; its client has {known.samples}")
        if key[:2] in view.outcomes:
            self.world.violated(f"the update {key} is recorded for a task that is {view.outcomes[key[:2]]}")
        view.rows[key] = known

    def _advanced(self, view: LedgerView, tasks: Mapping[Identity, int], rows) -> None:  # type: ignore[no-untyped-def]
        """Training tasks (and the versions that they began from) are closed and a version made of them.

        Of each of their updates once, and of nothing else; in a federation without rounds, of enough of them, of
        none that is too old, and of each as its age tells.
        """
        ((version, state, remainder, optimizer),) = rows(
            "SELECT version, state, remainder, optimizer FROM versions ORDER BY version DESC LIMIT 1"
        ) or [(0, b"", b"", b"")]
        if version != view.version + 1:
            self.world.violated(f"version {version} after {view.version}")
        members = {key: known for key, known in view.rows.items() if key[:2] in tasks}
        rounds = self.settings.round
        if rounds.mode == "buffered" and len(members) < rounds.buffer:
            self.world.violated(f"version {version} is made of {len(members)} updates; expected {rounds.buffer}")
        if rounds.mode == "synchronous" and len(tasks) != 1:
            self.world.violated(f"version {version} is made of the tasks {sorted(tasks)}; expected one")
        total, weight, deltas = np.zeros(self._base.size), 0.0, []
        for key, known in members.items():
            if key in view.counted:
                self.doubled += 1
                self.world.violated(f"the update {key} is counted in versions {view.counted[key]} and {version}")
            if key in self.denied:
                self.world.violated(f"the update {key} is counted and its client was told that it is not")
            view.counted[key] = version
            share = known.samples if self.settings.aggregation.weights == "samples" else 1
            age = view.version - tasks[key[:2]]
            if not 0 <= age <= (rounds.max_staleness if rounds.mode == "buffered" else 0):
                self.world.violated(f"the update {key} is counted in version {version} and began from {tasks[key[:2]]}")
            update = decode_update(known.data, self._layouts)
            delta = update.vectors["delta"].astype(np.float64)
            if self.settings.aggregation.algorithm == "scaffold":
                view.variates = view.variates - view.control - delta / update.scalars["distance"]
            total += delta * share / (1 + age) ** rounds.staleness
            weight += share
            deltas.append(delta)
        mean = total / weight if weight else total
        if self.settings.aggregation.algorithm == "median" and deltas:
            mean = np.median(deltas, axis=0)
        momentum = float(self.settings.server.options.get("momentum", 0.0))
        view.velocity = momentum * view.velocity + mean
        target = view.model + (view.velocity if momentum else mean)
        model = unpack_model(state, self.bundle.layout)
        published = model.parameters(self._base)
        left = np.frombuffer(remainder, "<f4")[: published.size].astype(np.float64) if remainder else 0.0
        reached = published.astype(np.float64) + left
        apart = float(np.abs(reached - target).max())
        scale = 1.0 + float(np.abs(target).max()) + float(np.abs(mean).max())
        if not apart < 1e-5 * scale:
            self.world.violated(f"version {version} is {apart:.2e} away from what its {len(members)} updates add up to")
        if self.settings.aggregation.algorithm == "scaffold":
            self._remembered(view, version, optimizer)
            control = model.control_vector(self.bundle.layout)
            view.control = 0.0 if control is None else control.astype(np.float64)
        view.model, view.version = reached, version
        view.digests[version], view.bits[version] = model.digest(), published.tobytes()
        self.world.note("oracle", f"version {version} of {len(members)} updates")

    def _remembered(self, view: LedgerView, version: int, optimizer: bytes) -> None:
        """The server's sum of control variates, at the end of whose name its state begins, is what updates make it."""
        kept = np.frombuffer(optimizer, "<f4", self._base.size, 2 + optimizer[1]).astype(np.float64)
        apart = float(np.abs(kept - view.variates).max())
        if not apart < 1e-4 * (1.0 + float(np.abs(kept).max())):
            self.world.violated(f"with version {version} the sum of control variates is {apart:.2e} off")

    @property
    def newest(self) -> LedgerView:
        """The ledger that clients follow."""
        return max(self.ledgers, key=lambda view: view.epoch)

    def view_of(self, epoch: int) -> LedgerView | None:
        """The ledger that an epoch belongs to."""
        ahead = [view for view in self.ledgers if view.epoch >= epoch]
        return min(ahead, key=lambda view: view.epoch, default=None)

    # What servers say.

    def server_says(self, view: LedgerView, topic: str, payload: bytes) -> None:
        """A server publishes."""
        if "/down/" not in topic:
            return
        message = m.decode(payload)
        if not isinstance(message, m.Receipt):
            return
        key = (message.epoch, message.task, topic.split("/")[3])
        outcome = view.outcomes.get(key[:2])
        match message.status:
            case "recorded":
                if key not in view.rows:
                    self.lost += 1
                    self.world.violated(f"the receipt of {key} says recorded; the ledger has no such update")
                if outcome == "void":
                    self.world.violated(f"the receipt of {key} says recorded; the task is void")
                self.receipts.add(key)
            case "void":
                if outcome != "void":
                    self.world.violated(f"the receipt of {key} says void; in the ledger the task is {outcome}")
            case _:
                if key in view.rows and outcome != "void":
                    self.lost += 1
                    self.world.violated(f"the receipt of {key} says {message.status}; the ledger has the update")

    # Clients.

    def made(self, client: str, identity: Identity, data: bytes, samples: int) -> None:
        """A client has encoded an update, and may send it from now on."""
        found = self.produced.setdefault((*identity, client), {})
        found[hashlib.sha256(data).digest()] = Produced(data, samples)

    def received(self, client: str, epoch: int, version: int, vector: bytes) -> None:
        """A client begins a task with these parameters."""
        view = self.view_of(epoch)
        if view is None or view.bits.get(version) != vector:
            self.world.violated(f"{client} works on parameters that are not those of version {version}")

    def holds(self, client: str, epoch: int, version: int, digest: bytes) -> None:
        """A client's store says what it holds."""
        view = self.view_of(epoch)
        if version and (view is None or view.digests.get(version) != digest):
            self.world.violated(f"{client} holds version {version} with a digest that is not the version's")

    def commits(
        self, client: str, identity: Identity, residual: bytes | None, settles: Mapping[str, bytes]
    ) -> ClientView:
        """A client is about to store an update; what the store will say then."""
        now = self.clients.setdefault(client, ClientView())
        if now.last is not None and now.fate is None and now.last != identity:
            self.world.violated(f"{client} overwrites the update {now.last}, whose fate it does not know")
        self._knows_void(client, now, identity)
        before = now.rests
        left = before[0] if residual is None else residual or None
        return ClientView(before, identity, before, (left, settles.get(MEMORY, before[1])))

    def _knows_void(self, client: str, now: ClientView, identity: Identity) -> None:
        """Whoever begins a task that is open knows of the void one before, which its residual hangs on."""
        view = self.view_of(identity[0])
        if now.last is None or not now.fate or now.after == now.before or view is None or identity in view.outcomes:
            return
        if view.outcomes.get(now.last) == "void":
            self.world.violated(f"{client} takes {now.last} for recorded and begins {identity}; the task is void")

    def settles(self, client: str, identity: Identity, recorded: bool) -> ClientView:
        """A client is about to act on a receipt; what the store will say then.

        The first receipt decides; after "recorded" another one can only be "void", which is the last word.
        """
        now = self.clients.setdefault(client, ClientView())
        if now.last != identity:
            return now
        key = (*identity, client)
        view = self.view_of(identity[0])
        if view is not self.newest:
            # A ledger was given up; of what it counted, the one that replaced it knows nothing.
            view = None
        if recorded and not any(key in known.rows for known in self.ledgers):
            self.world.violated(f"{client} takes {identity} for recorded; the ledger has no such update")
        fate = recorded if now.fate is None else now.fate and recorded
        if not fate and view is not None:
            if key in view.counted:
                self.world.violated(f"{client} takes {identity} for not recorded; it is counted")
            self.denied.add(key)
        return ClientView(now.after if fate else now.before, identity, now.before, now.after, fate)

    def stored(self, client: str, view: ClientView, store: Store) -> None:
        """The store has done it."""
        self.clients[client] = view
        self._residual(client, view, store)

    def doubts(self, client: str, view: ClientView) -> None:
        """A write was broken off: the store may say the new or the old."""
        now = self.clients.setdefault(client, ClientView())
        now.doubt = (view,)

    def boots(self, client: str, store: Store) -> None:
        """A client starts with what its disk holds."""
        now = self.clients.setdefault(client, ClientView())
        pending = store.held().pending
        found = (pending.epoch, pending.task) if pending is not None else None
        for view in (*now.doubt, now):
            if view.rests == _rests(store) and found == (view.last if view.fate is None else None):
                view.doubt = ()
                self.clients[client] = view
                return
        self.world.violated(f"{client} starts with a residual, a memory or an update that it did not have before")

    def forgets(self, client: str) -> None:
        """A client's state is gone with its SD card, or belonged to another bundle."""
        self.clients[client] = ClientView()
        for file in [file for file in self.kept if file.parent.name == client]:
            del self.kept[file]

    def _residual(self, client: str, view: ClientView, store: Store) -> None:
        if _rests(store) != view.rests:
            self.world.violated(f"{client} has a residual or memory that its receipts do not explain ({view.last})")

    # Blobs under way, on either side's disk.

    def keeps(self, file: Path, ref: m.BlobRef, index: int, data: bytes) -> Kept:
        """A chunk is about to be kept; the first one of another blob replaces what there is."""
        if file not in self.kept or self.kept[file].ref != ref:
            self.kept[file] = Kept(ref)
        self.kept[file].chunks[index] = data
        return self.kept[file]

    def power_lost(self, folder: Path) -> None:
        """What was not synced may be gone."""
        for file, kept in self.kept.items():
            if folder in file.parents:
                kept.whole.clear()

    def finds(self, file: Path, found: Assembly | None) -> None:
        """A new life finds these chunks: those of before, byte for byte, and after a kill all of them."""
        kept = self.kept.get(file)
        if kept is None or found is None:
            if found is not None:
                self.world.violated(f"{file} holds a blob that nobody has kept there")
            if kept is not None and kept.whole:
                self.world.violated(f"{file} held {len(kept.whole)} chunks; they are gone after a restart")
            return
        missing = set(found.missing())
        if lost := sorted(missing & kept.whole):
            self.world.violated(f"{file} does not hold the chunks {lost} any more, after a restart without a power cut")
        for index in set(range(count(found.ref))) - missing:
            start = index * found.ref.chunk
            if bytes(found._data[start : start + found.ref.chunk]) != kept.chunks.get(index):
                self.world.violated(f"{file} holds a chunk {index} that is not the one that came")

    # Everything else.

    def bounded(self, broker: SimBroker, clients: int, copies: int) -> None:
        """No queue and no set of retained topics grows without bound.

        ``copies`` is how often a message may come: faults that say things again are nobody's queue growing.
        """
        transfer = self.settings.transfer
        server = copies * (16 * clients + 2 * transfer.uploads * transfer.window + 50)
        for name, depth in broker.deepest.items():
            most = server if name == "server" else 200 + 4 * transfer.window
            if depth > most:
                self.world.violated(f"{depth} messages wait for {name}; expected at most {most}")

    def finished(self, rounds: int, server_folder: str, broker: SimBroker) -> None:
        """The run is over: every receipt is kept, and what is left on the broker can be cleared."""
        view = self.ledger(server_folder)
        with Ledger.read(Path(server_folder) / "ledger.db") as ledger:
            known = {*ledger.retained(), self._topics.offer}
        # A state folder that was given up takes with it what it knew.
        if len(self.ledgers) == 1 and (forgotten := sorted(set(broker.retained) - known)):
            self.world.violated(f"{len(forgotten)} topics stay on the broker, and no ledger has them: {forgotten[0]}")
        if view.rounds != rounds:
            self.world.violated(f"the run ends after {view.rounds} rounds; expected {rounds}")
        for key in self.receipts:
            mine = self.view_of(key[0])
            if mine is None or key not in mine.rows:
                self.lost += 1
                self.world.violated(f"the update {key} has a receipt and is gone")
            elif mine is view and mine.outcomes.get(key[:2]) is None and self.settings.round.mode == "synchronous":
                self.lost += 1
                self.world.violated(f"the update {key} has a receipt; its task never ends")


def _rests(store: Store) -> Rest:
    return store.residual(), store.recall(MEMORY)

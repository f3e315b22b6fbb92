"""Planted bugs: changes to the real code that the invariants must catch. If one slips through, the simulator is blind.

Each is what somebody might write, patched over what ships, with the kinds of faults under which it shows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import msgspec

from broker_server import events as e
from broker_server.coordinator import Coordinator
from broker_server.flights import Flights
from broker_server.ledger import Ledger
from broker_server.records import Task
from broker_server.spool import Spool
from broker_server.tasks import OpenTask
from broker_server.uploads import Uploads
from broker_server.worker import Worker as ServerWorker
from edge_client import events as c
from edge_client import partial, store
from edge_client.codec.model import Model, apply_model_delta, untrained
from edge_client.codec.versions import CodedState, shared
from edge_client.session import ClientSession
from edge_client.store import Store
from edge_client.wire import messages as m
from edge_client.wire.transfer import Checklist
from edge_client.worker import Worker
from tests.faults.plans import Plan, draw, without_rounds
from tests.faults.run import Result, run

Patches = list[Any]


@dataclass(frozen=True)
class Mutation:
    """A planted bug, and what brings it to light."""

    name: str
    patches: Callable[[], Patches]
    faults: tuple[str, ...] = ()
    shape: Callable[[Plan], Plan] = lambda plan: plan
    """What else the federations are like in which it shows."""

    def plan(self, seed: int) -> Plan:
        """The plan of a seed in which it may show."""
        return self.shape(draw(seed, "small").also(self.faults))

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The code has the bug."""
        with ExitStack() as stack:
            for patch in self.patches():
                stack.enter_context(patch)
            yield


def caught(mutation: Mutation, seeds: range) -> Result | None:
    """The first run among these seeds in which an invariant does not hold; None when all hold."""
    with mutation.planted():
        for seed in seeds:
            result = run(mutation.plan(seed))
            if result.violation is not None:
                return result
    return None


def _no_dedupe() -> Patches:
    record, announce = Ledger.record, OpenTask.announce

    def recorded(self: Ledger, *arguments: Any) -> bool:
        record(self, *arguments)
        return True

    def announced(self: OpenTask, client: str, blob: m.BlobRef, now: float) -> list[e.Action]:
        self._set(client, "asked")
        return announce(self, client, blob, now)

    return [mock.patch.object(Ledger, "record", recorded), mock.patch.object(OpenTask, "announce", announced)]


def _early_receipt() -> Patches:
    take = OpenTask._take

    def taken(self: OpenTask, client: str, data: bytes | None) -> list[e.Action]:
        actions = take(self, client, data)
        receipt = self._tell(client, m.Receipt(*self.identity, "recorded"))
        return [receipt, *actions] if actions else actions

    return [mock.patch.object(OpenTask, "_take", taken)]


def _not_restored() -> Patches:
    settle = Store.settle

    def settled(self: Store, epoch: int, task: int, *, recorded: bool) -> None:
        del recorded
        settle(self, epoch, task, recorded=True)

    return [mock.patch.object(Store, "settle", settled)]


def _early_promotion() -> Patches:
    commit = Store.commit

    def committed(self: Store, *arguments: Any, **named: Any) -> None:
        commit(self, *arguments, **named)
        last = self._index.last
        assert last is not None
        self._commit(msgspec.structs.replace(self._index, residual=last.after))

    return [mock.patch.object(Store, "commit", committed)]


def _credit_kept() -> Patches:
    chunk = Uploads.chunk

    def came(self: Uploads, *arguments: Any) -> Any:
        data, grants = chunk(self, *arguments)
        self.most -= data is not None
        return data, grants

    return [mock.patch.object(Uploads, "chunk", came)]


def _any_epoch() -> Patches:
    def task_of(self: Coordinator, epoch: int, task: int, client: str) -> OpenTask | None:
        del epoch
        open_ = self._open
        return open_ if open_ is not None and open_.identity[1] == task and client in open_ else None

    return [mock.patch.object(Coordinator, "_task_of", task_of)]


def _replayed_twice() -> Patches:
    replay = ServerWorker.replay

    def twice(self: ServerWorker, restored: e.Restored) -> Iterator[e.Event]:
        yield from replay(self, restored)
        task = restored.open_task
        if task is not None:
            for identity, _, samples, data in list(self._ledger.updates())[:1]:
                self._add(self._decode(data, task)[2], samples, identity)

    return [mock.patch.object(ServerWorker, "replay", twice)]


def _ageless() -> Patches:
    return [mock.patch("broker_server.algorithms.discounted", return_value=lambda report, update: report)]


def _overfull() -> Patches:
    record = Flights.record

    def all_of_them(self: Flights, most: int | None = None) -> list[e.Action]:
        del most
        return record(self)

    return [
        mock.patch.object(Flights, "record", all_of_them),
        mock.patch.object(Flights, "count", lambda self, kind, *states: 0 if states else _busy(self, kind)),
    ]


def _busy(flights: Flights, kind: str) -> int:
    return sum(flight.task.kind == kind and flight.state != "away" for flight in flights)


def _never_too_old() -> Patches:
    return [mock.patch.object(Flights, "expire", return_value=[])]


def _wrong_base() -> Patches:
    def model(self: Worker, invitation: m.Invitation, delta: bytes | None, bundle: Any) -> Model:
        layout = bundle.layout
        first = untrained(layout, bundle.initial_buffers())
        known = self.copies.load(invitation.digest, layout)
        if known is not None or delta is None:
            return known or first
        start = first if invitation.held == 0 else self._copy(self.store.held().digest, layout)
        good = apply_model_delta(start, delta, layout)
        if not isinstance(good.state, CodedState) or not isinstance(start.state, CodedState):
            return good
        # As if a delta led from the version that is held, not from its anchor.
        kept = shared(start.state, good.state)
        return Model(CodedState(layout, start.state.codes + good.state.codes[kept:]), good.buffers)

    return [mock.patch.object(Worker, "_model", model)]


def _cleared_early() -> Patches:
    prepared = OpenTask.prepared

    def swept(self: OpenTask, held: int, ref: m.BlobRef) -> list[e.Action]:
        more: list[e.Action] = [e.Sweep(ref)] if ref.inline is None else []
        return prepared(self, held, ref) + more

    return [mock.patch.object(OpenTask, "prepared", swept)]


def _wrong_weight() -> Patches:
    decode, last = ServerWorker._decode, [1]

    def decoded(self: ServerWorker, data: bytes, task: Task) -> Any:
        samples, *rest = decode(self, data, task)
        wrong, last[0] = last[0], samples
        return (wrong, *rest)

    return [mock.patch.object(ServerWorker, "_decode", decoded)]


def _not_synced() -> Patches:
    write = store._write

    def unsafe(path: Any, data: bytes, *, durable: bool) -> None:
        del durable
        write(path, data, durable=False)

    return [mock.patch.object(store, "_write", unsafe)]


def _early_void() -> Patches:
    void = OpenTask.void

    def voided(self: OpenTask) -> list[e.Action]:
        return void(self) + self.voided()

    return [mock.patch.object(OpenTask, "void", voided)]


def _void_forgotten() -> Patches:
    return [mock.patch.object(Ledger, "voids", return_value={})]


def _torn_chunks() -> Patches:
    return [mock.patch.object(partial, "_sum", return_value=0)]


def _uploads_forgotten() -> Patches:
    restore = Spool.restore

    def restored(self: Spool, tasks: Any) -> dict[str, Checklist]:
        restore(self, tasks)
        return {}

    return [mock.patch.object(Spool, "restore", restored)]


def _never_whole() -> Patches:
    def scanned(self: partial.PartialBlob) -> None:
        self.discard()

    return [mock.patch.object(partial.PartialBlob, "_scan", scanned)]


def _asks_once() -> Patches:
    handle = ClientSession.handle

    def handled(self: ClientSession, event: c.Event, now: float) -> list[c.Action]:
        actions = handle(self, event, now)
        self._ask_at = None
        return actions

    return [mock.patch.object(ClientSession, "handle", handled)]


def _last_word() -> Patches:
    def settled(self: Store, epoch: int, task: int, *, recorded: bool) -> None:
        last = self._index.last
        if last is not None and (last.epoch, last.task) == (epoch, task):
            kept = last.after if recorded else last.before
            done = msgspec.structs.replace(last, update="", settled=True)
            self._commit(msgspec.structs.replace(self._index, residual=kept, last=done))

    return [mock.patch.object(Store, "settle", settled)]


def _in_chunks(plan: Plan) -> Plan:
    """Everything travels in chunks, and slowly enough to die on the way."""
    return replace(plan, inline=0, hidden=40, window=1, kind="none")


def _scarce(plan: Plan) -> Plan:
    """Rounds need nearly everyone and end early: that some are missing makes them void."""
    most = plan.clients - 1
    return replace(
        plan,
        rounds=3,
        cohort=most,
        minimum=most,
        over_select=1.0,
        deadline=plan.training + 4,
        feedback="residual",
        kind="quantized",
    )


MUTATIONS = (
    Mutation("no dedupe", _no_dedupe, ("duplication",)),
    Mutation("an old update counts in full", _ageless, (), without_rounds),
    Mutation("an update beyond the buffer counts in two versions", _overfull, (), without_rounds),
    Mutation("an update of any age is accepted", _never_too_old, ("partition", "client kill"), without_rounds),
    Mutation("receipt before ledger commit", _early_receipt),
    Mutation("residual not restored on a late receipt", _not_restored),
    Mutation("residual promoted before the receipt", _early_promotion),
    Mutation("credit never returned", _credit_kept),
    Mutation("accepting an older epoch's update", _any_epoch, ("new state folder",)),
    Mutation("counting an update twice after replay", _replayed_twice, ("server kill",)),
    Mutation("applying a delta to the wrong base version", _wrong_base),
    Mutation("clearing a blob that a slow client still pulls", _cleared_early, ("delay", "delay")),
    Mutation("weight taken from the wrong client", _wrong_weight),
    Mutation("state not synced to the disk", _not_synced, ("client power cut",)),
    Mutation("void told before ledger commit", _early_void, ("client leaves",)),
    Mutation(
        "void tasks forgotten by a restart",
        _void_forgotten,
        ("client leaves", "loss", "server kill", "server kill"),
        _scarce,
    ),
    Mutation("a torn chunk taken for whole", _torn_chunks, ("client power cut", "server power cut"), _in_chunks),
    Mutation("kept uploads forgotten by a restart", _uploads_forgotten, ("server kill", "server kill"), _in_chunks),
    Mutation("a download begun anew after a restart", _never_whole, ("client kill", "client kill"), _in_chunks),
    Mutation("a lost offer not asked for", _asks_once, ("loss",)),
    Mutation("the last receipt decides", _last_word, ("replay", "replay", "replay", "unavailable")),
)

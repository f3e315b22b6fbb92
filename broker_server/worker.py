"""The server's heavy work, one action at a time: check and record updates, aggregate, build deltas, evaluate.

One thread does all of it, in the order in which the coordinator asked, because the ledger has one writer and updates
are added to the sum in ledger order: a replay after a crash then gives the same bits.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from broker_server import events as e
from broker_server.aggregation.buffers import BufferAggregator
from broker_server.aggregation.gathering import Gathering
from broker_server.aggregation.weighting import Report as Contribution
from broker_server.algorithms import aggregator, needs, server_optimizer, stage, variates
from broker_server.analytics import report_plan
from broker_server.artifacts import Report, write_artifacts
from broker_server.claims import checked_samples, trained
from broker_server.config import Federation
from broker_server.database import Lock
from broker_server.evaluation import HeldOut
from broker_server.findings import FOLDER, Collection, write_findings
from broker_server.ledger import BEST, Ledger
from broker_server.personal import check_personal
from broker_server.publication import Publication
from broker_server.records import Misconduct, Task
from broker_server.spool import Spool
from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.codec.update import decode_update, max_update_bytes
from edge_client.errors import CodecError, WireError
from edge_client.manifest import update_layouts
from edge_client.wire import transfer
from edge_client.wire.messages import BlobRef

Arrays = Mapping[str, npt.NDArray[Any]]
_MODE = "mode"
"""The note that holds the ``round.mode`` of the open tasks, and what their updates must say."""
_REPORT = "report"
"""The note that holds what the open evaluation asks clients to count."""
_RUN = "run"
"""The note that holds the first epoch of the ledger, which names what is trained in it."""
_FLEET = "fleet"
"""The note that holds how many clients there were."""
_ISSUED = "issued"
"""The note that holds the date of the newest offer."""
_VALUE_LIMIT = 1e9
"""An update with a larger value is refused: one that diverged would take the model of all with it."""


def ledger_path(settings: Federation) -> Path:
    """Where a federation's ledger is."""
    return Path(settings.federation.state) / "ledger.db"


class Worker:
    """What the coordinator's actions work on; every call comes from the thread that made it.

    ``lock`` is the caller's lock on `ledger_path`, where it was taken before.

    Raises:
        BundleError, ConfigError, DataError, LedgerError: what the settings name cannot be used, or not as they say.
    """

    def __init__(self, settings: Federation, bundle_bytes: bytes, lock: Lock | None = None) -> None:
        self.bundle = Bundle.from_bytes(bundle_bytes)
        check_personal(settings, self.bundle)
        self._settings = settings
        self.limits = settings.transfer
        """How blobs are cut; to be set, where the broker asks for it, before `start`."""
        self._state = Path(settings.federation.state)
        self._state.mkdir(parents=True, exist_ok=True)
        held_out = settings.evaluation.data
        self._held_out = (
            HeldOut.open(
                self.bundle,
                held_out,
                batch_size=settings.evaluation.batch_size,
                threads=os.cpu_count() or 1,  # clients wait meanwhile
            )
            if held_out
            else None
        )
        rule, optimizer = aggregator(settings, self.bundle.manifest), server_optimizer(settings)
        kept = variates(settings)
        self._needs = needs(settings, self.bundle.manifest)
        self._ledger = Ledger.open(
            ledger_path(settings), federation=settings.federation.name, bundle=self.bundle.digest, lock=lock
        )
        self._publication = Publication(self.bundle, self._ledger, settings.codec, optimizer, kept)
        self._layouts = update_layouts(self.bundle.manifest)
        self._gathering = Gathering(
            rule,
            stage(settings),
            BufferAggregator.of(self.bundle.manifest),
            self._layouts,
            self._ledger.update,
            self._state,
            None if kept is None else kept.factor,
        )
        self._collection = Collection(settings, self.bundle.manifest)
        self._limit = max(max_update_bytes(self._layouts), self._collection.limit)
        self.spool = Spool(self._state / "uploads", limit=self._limit)
        self._tasks: dict[tuple[int, int], Task] = {}
        self._blobs: dict[bytes, bytes] = {}
        self._files: dict[bytes, Path] = {}
        """Blobs that are too many to be in memory."""
        self._bundle_bytes = bundle_bytes

    def start(self) -> e.Restored:
        """Begin a new epoch where the ledger left off."""
        open_tasks = self._reopen()
        rounds = tuple(self._ledger.rounds())
        with self._ledger.group():
            epoch = self._ledger.new_epoch()
            if (run := self._ledger.get(_RUN)) is None:
                self._ledger.put(_RUN, run := str(epoch))
        return e.Restored(
            epoch=epoch,
            version=self._publication.version,
            digest=self._publication.digest,
            bundle=self._blob(self._bundle_bytes),
            update_limit=self._limit,
            last_task=self._ledger.last_task(),
            rounds=rounds,
            unfinished=self._ledger.unfinished(),
            open_tasks=open_tasks,
            digests=self._publication.digests({task.version for task in open_tasks} | self._held()),
            leftovers=tuple(self._ledger.retained()),
            fleet=int(self._ledger.get(_FLEET) or 0),
            voids=self._ledger.voids(),
            uploads=self.spool.restore(open_tasks),
            pace=self._publication.pace,
            issued=float(self._ledger.get(_ISSUED) or 0),
            run=int(run),
        )

    def _held(self) -> set[int]:
        """Versions that clients may hold, and a delta may start from."""
        if self._settings.codec.kind == "none":
            return set()  # the whole model leads from anywhere
        return {version for version, _, kept in self._ledger.versions() if kept}

    def replay(self, restored: e.Restored) -> Iterator[e.Event]:
        """Add up again what was recorded for the tasks that were under way."""
        self._tasks = {(task.epoch, task.task): task for task in restored.open_tasks}
        for identity, client, samples, data in self._ledger.updates():
            _, scalars, vectors = self._decode(data, self._tasks[identity])
            self._add(identity, client, samples, scalars, vectors)
            yield e.Recorded(*identity, client, samples, scalars)

    def perform_all(self, actions: Sequence[e.Action]) -> list[e.Event | None]:
        """Carry out several actions in one commit: all of them are on the disk before any answer is known."""
        with self._ledger.group():
            answers = [self.perform(action) for action in actions]
        for action in actions:
            if isinstance(action, e.Record) and action.data is None:
                self.spool.discard((action.epoch, action.task), action.client)
        return answers

    def perform(self, action: e.Action) -> e.Event | None:
        """Carry out one action; its answer, where it has one."""
        match action:
            case e.OpenTask(task):
                self._tasks[task.epoch, task.task] = task
                self._ledger.open_task(msgspec.structs.replace(task, opened=time.time()))
                return e.Opened(task.epoch, task.task)
            case e.Enlarge(epoch, number, clients):
                self._ledger.invite(epoch, number, clients)
                return e.Opened(epoch, number)
            case e.Record():
                return self._record(action)
            case e.Inquire():
                return self._inquire(action)
            case e.Prepare(held, version):
                return e.Prepared(held, version, self._blob(self._publication.delta(held, version)))
            case e.Aggregate(closes, result, keep):
                clipped = self._publication.advance(self._gathering.finish(), result, closes=closes, keep=keep)
                for identity in closes:
                    self._tasks.pop(identity)
                    self.spool.discard(identity)
                return e.Aggregated(
                    self._publication.version, self._publication.digest, clipped, self._publication.pace
                )
            case e.CloseTask(epoch, number, outcome):
                self._ledger.close_task(epoch, number, outcome)
                self._tasks.pop((epoch, number))
                self.spool.discard((epoch, number))
                if (epoch, number) in self._gathering:
                    self._gathering.clear()
                return e.Closed(epoch, number)
            case e.Evaluate(version):
                assert self._held_out is not None
                vector, buffers = self._publication.parameters(version), self._publication.buffers(version)
                return e.Evaluated(version, self._held_out.evaluate(vector, buffers=buffers))
            case e.Dated(issued):
                self._ledger.put(_ISSUED, repr(issued))
            case e.Misconduct(client, kind, reason, seconds):
                self._ledger.accuse(Misconduct(time.time(), client, kind, reason, seconds))
            case e.Adopt(ref, path):
                self._files[ref.sha256] = Path(path)
            case e.FinishRound(result, best, fleet):
                found = self._collection.finish(result.round, result.version)
                with self._ledger.group():
                    self._ledger.put(_FLEET, str(fleet))
                    self._ledger.finish_round(result)
                    if best:
                        self._ledger.put(BEST, str(result.version))
                    if found is not None:
                        self._ledger.find(result.round, msgspec.json.encode(found))
                if found is not None:
                    write_findings(self._state / FOLDER, found)
            case _:
                raise AssertionError(f"{action} is not for the worker")
        return None

    def chunks(self, ref: BlobRef, indices: tuple[int, ...]) -> list[tuple[int, bytes]]:
        """Chunks of a blob that this worker built or adopted; none once it is forgotten."""
        if (path := self._files.get(ref.sha256)) is not None:
            with contextlib.suppress(OSError), path.open("rb") as file:
                return [(index, _read(file, ref, index)) for index in indices]
        data = self._blobs.get(ref.sha256)
        return [] if data is None else [(index, transfer.piece(data, ref, index)) for index in indices]

    def retain(self, topics: list[str]) -> None:
        """Note topics before anything is retained on them."""
        self._ledger.retain(topics)

    def release(self, topics: Iterable[str], ref: BlobRef | None = None) -> None:
        """Forget topics that are cleared, and the blob that they carried."""
        if ref is not None:
            self._blobs.pop(ref.sha256, None)
            self._files.pop(ref.sha256, None)
        self._ledger.released(topics)

    def write_models(self) -> dict[str, Report]:
        """Write the best and the last version as deployable models, and what they are worth; by folder."""
        best = int(self._ledger.get(BEST) or self._publication.version)
        data = self._held_out.source if self._held_out is not None else None
        reports = {}
        for name, version in (("best", best), ("last", self._publication.version)):
            about: dict[str, str | int | float] = {"version": version, **self._absent()}
            folder = self._state / "models" / name
            vector, buffers = self._whole(version)
            reports[str(folder)] = write_artifacts(folder, self.bundle, vector, data=data, buffers=buffers, about=about)
        return reports

    def _whole(self, version: int) -> tuple[Vector, Vector]:
        """Parameters and buffers of a version; those that stay on the clients are as in the bundle."""
        bundle = self.bundle
        vector, buffers = bundle.first(bundle.trained), bundle.first(bundle.tracked)
        bundle.trained.insert(vector, bundle.layout, self._publication.parameters(version))
        bundle.tracked.insert(buffers, bundle.manifest.layout("buffer"), self._publication.buffers(version))
        return vector, buffers

    def _absent(self) -> dict[str, str]:
        """What a model of the server says of the layers that stay on the clients."""
        names = ", ".join(tensor.name for tensor in self.bundle.kept.tensors)
        return {"personal": f"untrained here, as in the bundle: {names}"} if names else {}

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def _record(self, action: e.Record) -> e.Event:
        identity = action.epoch, action.task
        try:
            data = self.spool.take(identity, action.client) if action.data is None else action.data
            samples, scalars, vectors = self._decode(data, self._tasks[identity])
            self._bound(vectors)
        except CodecError as error:
            return e.Refused(*identity, action.client, str(error))
        except WireError:
            return e.Damaged(*identity, action.client)
        added = self._ledger.record(*identity, action.client, data, samples)
        if added:
            self._add(identity, action.client, samples, scalars, vectors)
        return e.Recorded(action.epoch, action.task, action.client, samples, scalars)

    def _reopen(self) -> tuple[Task, ...]:
        """The tasks to go on with; others are void: of an evaluation without rounds, which is done anew, or where what
        updates must say was changed."""
        mode, tasks = self._settings.round.mode, self._ledger.open_tasks()
        asked = " ".join((mode, *(f"{name}>={least:g}" if least else name for name, least in self._needs.items())))
        report = msgspec.json.encode(report_plan(self._settings)).decode()
        kept = tasks[-1:] if mode == "synchronous" else [task for task in tasks if task.kind == "train"]
        with self._ledger.group():
            if self._ledger.get(_MODE) not in (None, asked):
                kept = []
            if self._ledger.get(_REPORT) not in (None, report):
                kept = [task for task in kept if task.kind == "train"]
            self._ledger.put(_MODE, asked)
            self._ledger.put(_REPORT, report)
            for task in tasks:
                if task not in kept:
                    self._ledger.close_task(task.epoch, task.task, "void")
        return tuple(kept)

    def _add(
        self,
        identity: tuple[int, int],
        client: str,
        samples: int,
        scalars: Mapping[str, float],
        vectors: Arrays,
    ) -> None:
        if "delta" in vectors:
            # The version grows only when a sum is finished: a replay finds the same staleness.
            age = self._publication.version - self._tasks[identity].version
            self._gathering.add(identity, Contribution(client, samples, scalars, age), vectors)
        else:
            self._collection.add(vectors)

    def _decode(self, data: bytes, task: Task) -> tuple[int, dict[str, float], Arrays]:
        """Samples, scalars and vectors of an update; those of an evaluation are counts.

        Raises:
            CodecError: it is damaged, is for another bundle, is not finite or counts no samples.
        """
        if task.kind == "evaluate":
            return self._collection.read(data)
        update = decode_update(data, self._layouts)
        samples = checked_samples(update.scalars.get("samples", 0.0))
        for vector in update.vectors.values():
            highest = float(np.abs(vector).max(initial=0.0))
            if not highest < _VALUE_LIMIT:
                found = f"values up to {highest:.1e}" if math.isfinite(highest) else "NaN or infinite values"
                raise CodecError(f"update holds {found}: training diverged; a lower learning rate may help")
        finite = {name: value for name, value in update.scalars.items() if math.isfinite(value)}
        for name, least in self._needs.items():
            value = finite.get(name, -1.0)
            if value and not least <= value <= _VALUE_LIMIT:
                raise CodecError(
                    f"update says {update.scalars.get(name, 'nothing')} of its {name}; expected {least:g} to "
                    f"{_VALUE_LIMIT:g}, which {self._settings.aggregation.algorithm} needs: update fedge on the device"
                )
        told = trained(finite, samples, self.bundle.manifest)
        return self._settings.limits.count(samples), told, update.vectors

    def _bound(self, vectors: Mapping[str, Vector]) -> None:
        """Refuse an update that would pull the model of all too far.

        Raises:
            CodecError: its norm is more than ``limits.norm``.
        """
        most = self._settings.limits.norm
        if not most or "delta" not in vectors:
            return
        norm = float(np.linalg.norm(vectors["delta"]))
        if norm > most:
            raise CodecError(f"update has norm {norm:.3g}; limits.norm allows {most:g}")

    def _inquire(self, action: e.Inquire) -> e.Event:
        outcome = self._ledger.outcome(action.epoch, action.task)
        if outcome == "void":
            status: Literal["recorded", "late", "void"] = "void"
        elif action.client in self._ledger.recorded(action.epoch, action.task):
            status = "recorded"
        else:
            status = "late"
        return e.Answered(action.epoch, action.task, action.client, status)

    def _blob(self, data: bytes) -> BlobRef:
        ref = transfer.refer(data, chunk=self.limits.chunk, inline=self.limits.inline)
        if ref.inline is None:
            self._blobs[ref.sha256] = data
        return ref


def _read(file: BinaryIO, ref: BlobRef, index: int) -> bytes:
    file.seek(index * ref.chunk)
    return file.read(ref.chunk)

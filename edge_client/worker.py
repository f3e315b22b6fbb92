"""One task on a device: bring the model to the task's version, learn, encode and keep what came of it."""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout
from edge_client.codec.model import Model, apply_model_delta, untrained
from edge_client.codec.update import CodecSettings, EncodedUpdate, encode_update
from edge_client.data import DataSource
from edge_client.errors import CodecError, FedgeError, StoreError, TrainingError
from edge_client.events import Failed, Finished, Work
from edge_client.feedback import add_residual, lengthening, pack_residual
from edge_client.learning.assessment import assess
from edge_client.learning.assignment import Assignment, Learned
from edge_client.learning.local import train
from edge_client.learning.own import Served
from edge_client.learning.personal import is_personal
from edge_client.manifest import update_layouts
from edge_client.reporting import USUAL, report_layouts
from edge_client.shelf import Shelf
from edge_client.store import ModelCopies, Store
from edge_client.trainer import Trainer
from edge_client.wire.messages import Invitation, UpdatePlan


@dataclass(frozen=True)
class Worker:
    """What a client needs to do tasks: its data, its store, and where its copy of the model rests."""

    client: str
    train: DataSource
    test: DataSource
    store: Store
    copies: ModelCopies
    shelf: Shelf | None = None
    """Where other programs find the model; a phone that is emulated has none."""
    shares: Collection[str] = USUAL
    """What it tells of its data in evaluations, where it is asked."""

    def perform(self, work: Work, trainer: Trainer, stop: Callable[[], bool]) -> Finished | Failed:
        """Do one task; whatever goes wrong with it becomes the reason of a Failed.

        ``stop`` is asked between steps; once it is true, the task ends as Failed.
        """
        invitation = work.invitation
        held = self.store.held()
        version, digest = held.version, held.digest
        try:
            model = self._model(invitation, work.delta, trainer.bundle)
            if not is_personal(trainer.bundle, invitation.plan):
                self._serve(trainer.bundle, model, invitation.version, None)
            learned = self._learned(invitation, model, trainer, stop)
            update, residual = self._encoded(invitation, learned, trainer.bundle)
            if model.digest() != digest:
                self.copies.save(model.digest(), model, digest)
            self.store.commit(
                invitation.epoch,
                invitation.task,
                update,
                residual,
                version=invitation.version,
                digest=model.digest(),
                settles=learned.settles,
                keeps=learned.keeps,
            )
            if learned.serves is not None:
                self._serve(trainer.bundle, model, invitation.version, learned.serves)
        except CodecError as error:
            # The copy cannot be trusted any more: the next task starts from the bundle's weights.
            with contextlib.suppress(StoreError):
                self.store.hold(0, digest=bytes(32))
            return Failed(invitation.epoch, invitation.task, str(error), 0, bytes(32))
        except FedgeError as error:
            return Failed(invitation.epoch, invitation.task, str(error), version, digest)
        return Finished(invitation.epoch, invitation.task, update, invitation.version, model.digest())

    def _serve(self, bundle: Bundle, model: Model, version: int, own: Served | None) -> None:
        if self.shelf is not None:
            # A disk without room for it does not keep the device from training.
            with contextlib.suppress(StoreError):
                self.shelf.put(bundle, model, version, own)

    def _model(self, invitation: Invitation, delta: bytes | None, bundle: Bundle) -> Model:
        layout = bundle.layout
        first = untrained(layout, bundle.initial_buffers())
        # Copies are named by what they hold, so one of that name is the model, wherever it came from.
        known = self.copies.load(invitation.digest, layout)
        if known is not None:
            model = known
        elif delta is None:
            model = first
        else:
            held = self.store.held()
            start = first if invitation.held == 0 else self._copy(held.digest, layout)
            model = apply_model_delta(start, delta, layout)
        if model.digest() != invitation.digest:
            raise CodecError(
                f"model version {invitation.version} has digest {model.digest().hex()[:12]} here; "
                f"the server says {invitation.digest.hex()[:12]}"
            )
        return model

    def _copy(self, digest: bytes, layout: Layout) -> Model:
        model = self.copies.load(digest, layout)
        if model is None:
            raise CodecError(f"the copy of the model with digest {digest.hex()[:12]} is lost")
        return model

    def _learned(self, invitation: Invitation, model: Model, trainer: Trainer, stop: Callable[[], bool]) -> Learned:
        task = Assignment(
            invitation.plan,
            self._seed(invitation),
            model,
            trainer,
            self.train,
            self.test,
            self.store.recall,
            stop,
            self.shelf is not None,
            self.shares,
        )
        return train(task) if invitation.kind == "train" else assess(task)

    def _encoded(self, invitation: Invitation, learned: Learned, bundle: Bundle) -> tuple[bytes, bytes | None]:
        """The update, and what its encoding left over: no bytes are nothing, None leaves what there is."""
        if invitation.kind == "evaluate":
            asked = report_layouts(bundle.manifest, invitation.plan.report)
            layouts = {name: asked[name] for name in learned.vectors}
            return encode_update(learned.vectors, layouts, learned.scalars, CodecSettings()).data, None
        plan, delta = invitation.update, learned.vectors["delta"]
        layouts = update_layouts(bundle.manifest)
        stored = self.store.residual() if plan.feedback == "residual" else None
        if stored is not None:
            # One that cannot be used costs a little accuracy once, and must not cost every task from now on.
            with contextlib.suppress(CodecError):
                add_residual(delta, stored, bundle.layout, invitation.version)
        encoded = _at_rate(learned, layouts, plan)
        if not np.isfinite(delta).all():
            return encoded.data, None  # it will be refused
        if plan.feedback == "residual":
            return encoded.data, pack_residual(encoded.residual, bundle.layout, invitation.version)
        if plan.feedback == "length" and (factor := lengthening(delta, encoded.residual)) > 1:
            delta *= np.float32(factor)
            encoded = _at_rate(learned, layouts, plan)
        return encoded.data, b""

    def _seed(self, invitation: Invitation) -> int:
        """Each client and round shuffles its own way, and the same way again, also after restarts of the server."""
        text = f"{invitation.seed}/{invitation.round}/{self.client}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _at_rate(learned: Learned, layouts: Mapping[str, Layout], plan: UpdatePlan) -> EncodedUpdate:
    """The update at the plan's rate, or at the one that its limit leaves."""
    try:
        settings = CodecSettings(plan.kind, plan.target, plan.value)
    except ValueError as error:
        raise TrainingError(f"the plan's rate cannot be kept: {error}; set [codec] of the federation") from error

    def at(rate: CodecSettings) -> EncodedUpdate:
        return encode_update(learned.vectors, layouts, learned.scalars, rate)

    if plan.kind == "none" or not plan.limit:
        return at(settings)
    slow = CodecSettings("quantized", "bytes", float(plan.limit))
    if plan.target == "bytes":
        return at(min(settings, slow, key=lambda rate: rate.value))
    encoded = at(settings)
    return encoded if len(encoded.data) <= plan.limit else at(slow)

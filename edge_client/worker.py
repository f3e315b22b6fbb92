"""One task on a device: bring the model to the task's version, train or evaluate, encode what came of it."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.model import Model, apply_model_delta, untrained
from edge_client.codec.update import CodecSettings, EncodedUpdate, encode_update
from edge_client.data import DataSource
from edge_client.errors import CodecError, FedgeError, StoreError, TrainingError
from edge_client.events import Failed, Finished, Work
from edge_client.feedback import add_residual, lengthening, pack_residual
from edge_client.manifest import update_layouts
from edge_client.shelf import Shelf
from edge_client.store import ModelCopies, Store
from edge_client.trainer import Trainer
from edge_client.wire.messages import RECEIVED_LOSS, Invitation, UpdatePlan


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

    def perform(self, work: Work, trainer: Trainer, stop: Callable[[], bool]) -> Finished | Failed:
        """Do one task; whatever goes wrong with it becomes the reason of a Failed.

        ``stop`` is asked between steps; once it is true, the task ends as Failed.
        """
        invitation = work.invitation
        held = self.store.held()
        version, digest = held.version, held.digest
        try:
            model = self._model(invitation, work.delta, trainer.bundle)
            if self.shelf is not None:
                # A disk without room for it does not keep the device from training.
                with contextlib.suppress(StoreError):
                    self.shelf.put(trainer.bundle, model, invitation.version)
            update, residual = self._result(invitation, model, trainer, stop)
            if model.digest() != digest:
                self.copies.save(model.digest(), model, digest)
            self.store.commit(
                invitation.epoch,
                invitation.task,
                update,
                residual,
                version=invitation.version,
                digest=model.digest(),
            )
        except CodecError as error:
            # The copy cannot be trusted any more: the next task starts from the bundle's weights.
            with contextlib.suppress(StoreError):
                self.store.hold(0, digest=bytes(32))
            return Failed(invitation.epoch, invitation.task, str(error), 0, bytes(32))
        except FedgeError as error:
            return Failed(invitation.epoch, invitation.task, str(error), version, digest)
        return Finished(invitation.epoch, invitation.task, update, invitation.version, model.digest())

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

    def _result(
        self, invitation: Invitation, model: Model, trainer: Trainer, stop: Callable[[], bool]
    ) -> tuple[bytes, bytes | None]:
        bundle, plan = trainer.bundle, invitation.update
        layouts = update_layouts(bundle.manifest)
        # One vector is the received model, then the trained one, then the difference.
        vector = model.parameters(bundle.initial())
        if invitation.kind == "evaluate":
            sums = trainer.evaluate(vector, self.test, buffers=model.buffers)
            scalars = {f"sum.{name}": value for name, value in sums.items()} | {"samples": float(self.test.samples)}
            return encode_update({}, {}, scalars, CodecSettings()).data, None
        measured: dict[str, float] = {}
        if invitation.plan.measure:
            received = trainer.evaluate(vector, self.train, buffers=model.buffers)
            measured[RECEIVED_LOSS] = received["loss"] / max(1.0, received["count"])
        result = trainer.train(
            vector, self.train, invitation.plan, seed=self._seed(invitation), stop=stop, buffers=model.buffers
        )
        if stop():
            raise TrainingError("stopped: the server has moved on")
        delta = np.subtract(vector, model.parameters(bundle.initial()), out=vector)
        stored = self.store.residual() if plan.feedback == "residual" else None
        if stored is not None:
            # One that cannot be used costs a little accuracy once, and must not cost every task from now on.
            with contextlib.suppress(CodecError):
                add_residual(delta, stored, bundle.layout, invitation.version)
        scalars = (
            measured
            | {
                "samples": float(result.samples),
                "steps": float(result.steps),
                "seconds": result.seconds,
                "loss": result.loss,
            }
            | {f"sum.{name}": value for name, value in result.metrics.items()}
        )
        vectors = {"delta": delta} | ({"buffers": result.buffers} if "buffers" in layouts else {})
        encoded = self._encoded(vectors, layouts, scalars, plan)
        if not np.isfinite(delta).all():
            return encoded.data, None  # it will be refused
        if plan.feedback == "residual":
            return encoded.data, pack_residual(encoded.residual, bundle.layout, invitation.version)
        if plan.feedback == "length" and (factor := lengthening(delta, encoded.residual)) > 1:
            delta *= np.float32(factor)
            encoded = self._encoded(vectors, layouts, scalars, plan)
        return encoded.data, b""

    def _encoded(
        self,
        vectors: Mapping[str, Vector],
        layouts: Mapping[str, Layout],
        scalars: Mapping[str, float],
        plan: UpdatePlan,
    ) -> EncodedUpdate:
        """The update at the plan's rate, or at the one that its limit leaves."""
        try:
            settings = CodecSettings(plan.kind, plan.target, plan.value)
        except ValueError as error:
            raise TrainingError(f"the plan's rate cannot be kept: {error}; set [codec] of the federation") from error
        if plan.kind == "none" or not plan.limit:
            return encode_update(vectors, layouts, scalars, settings)
        slow = CodecSettings("quantized", "bytes", float(plan.limit))
        if plan.target == "bytes":
            return encode_update(vectors, layouts, scalars, min(settings, slow, key=lambda rate: rate.value))
        encoded = encode_update(vectors, layouts, scalars, settings)
        return encoded if len(encoded.data) <= plan.limit else encode_update(vectors, layouts, scalars, slow)

    def _seed(self, invitation: Invitation) -> int:
        """Each client and round shuffles its own way, and the same way again, also after restarts of the server."""
        text = f"{invitation.seed}/{invitation.round}/{self.client}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

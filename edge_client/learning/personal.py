"""What a device learns for itself: layers of its own, a model of its own (Ditto), or the global one fine-tuned.

- Layers that stay on the device are trained with the others, as in FedPer (Arivazhagan et al. 2019, arXiv 1912.00818)
  and FedBN (Li et al. 2021, arXiv 2102.07623); or before them, while the others are fixed, and then the others while
  they are fixed, as in FedRep (Collins et al. 2021, arXiv 2102.07078).
- Ditto (Li et al. 2021, arXiv 2012.04221): beside its part in the global model, each device trains a whole model v of
  its own on ``F_k(v) + lambda / 2 |v - w|^2``, where ``w`` is the global model as received. It begins as ``w`` of the
  first task, and is kept.
- Fine-tuning: the global model is trained on before it is used. What comes of it is not sent, and not kept.
"""

import math
from collections.abc import Collection, Mapping

from edge_client.bundle import Bundle
from edge_client.codec.quantize import peak
from edge_client.errors import TrainingError
from edge_client.learning.assignment import Assignment
from edge_client.learning.own import DITTO, LAYERS, OwnModel, Served, remembered_layers, remembered_model
from edge_client.learning.remembered import pack_vector
from edge_client.wire.messages import TrainPlan

_HEAD, _OWN = 1, 2
"""What sets the batches of the passes of a task apart that are no part of the update."""


def assembled(task: Assignment) -> OwnModel:
    """The received model with the device's own layers, the bundle's where it has never trained."""
    bundle = task.bundle
    return OwnModel.joined(bundle, task.received, remembered_layers(bundle, task.recall) if bundle.kept.size else None)


def train_head(task: Assignment, model: OwnModel) -> tuple[OwnModel, Collection[str]]:
    """The pass of FedRep over the personal layers, where the plan has one: the model after it, and what is fixed next.

    Raises:
        TrainingError: the task was stopped, or the runtime failed.
    """
    bundle, epochs = task.bundle, task.plan.personal.head_epochs
    if not epochs or not bundle.kept.size:
        return model, ()
    plan = _pass(task.plan, {}, epochs=epochs)
    trained = _trained(task, model, plan, _HEAD, fixed=_names(bundle, "trainable"))
    return trained, _names(bundle, "personal")


def learned(task: Assignment, model: OwnModel) -> tuple[dict[str, bytes], Served | None]:
    """What the device keeps of a training task, by name, and the model that it has for itself now.

    ``model`` is what was trained for all. What diverged does not replace what there is.

    Raises:
        TrainingError: the task was stopped, or the runtime failed.
    """
    bundle, method, found = task.bundle, task.plan.personal.method, dict[str, bytes]()
    if method == "ditto":
        own = _ditto(task)
        if own.finite:
            return {DITTO: own.packed(bundle)}, Served(own, "ditto") if task.serves else None
    elif task.recall(DITTO) is not None:
        found[DITTO] = b""
    layers = None
    if bundle.kept.size:
        layers = model.kept(bundle)
        if math.isfinite(peak(layers)):
            found[LAYERS] = pack_vector(layers, bundle.kept)
        else:
            layers = remembered_layers(bundle, task.recall)
    if not task.serves or not is_personal(bundle, task.plan):
        return found, None
    return found, served(task, OwnModel.joined(bundle, task.received, layers))


def _ditto(task: Assignment) -> OwnModel:
    personal, bundle = task.plan.personal, task.bundle
    received = OwnModel.joined(bundle, task.received)
    start = remembered_model(bundle, task.recall) or received.copy()
    plan = _pass(task.plan, {"mu": personal.pull}, epochs=personal.epochs, steps=personal.steps)
    return _trained(task, start, plan, _OWN, anchor=received)


def served(task: Assignment, model: OwnModel) -> Served | None:
    """The model that the device has for itself at the task's version; None where that is the global one.

    ``model`` is the received one with the device's own layers. Fine-tuning happens here; it trains the personal layers
    alone where there are any, and where it diverges the model is served without it.

    Raises:
        TrainingError: the task was stopped, or the runtime failed.
    """
    personal, bundle = task.plan.personal, task.bundle
    if personal.method == "ditto":
        return Served(remembered_model(bundle, task.recall) or model, "ditto")
    if personal.method == "fine-tune":
        hypers = {"mu": 0.0} if bundle.manifest.proximal else {}
        plan = _pass(task.plan, hypers, epochs=personal.epochs, steps=personal.steps)
        fixed = _names(bundle, "trainable") if bundle.kept.size else ()
        tuned = _trained(task, model.copy(), plan, _OWN, fixed=fixed)
        return Served(tuned if tuned.finite else model, "fine-tune")
    return Served(model, "layers") if bundle.kept.size else None


def is_personal(bundle: Bundle, plan: TrainPlan) -> bool:
    """Whether a device that trains so has a model of its own."""
    return bool(bundle.kept.size) or plan.personal.method != "none"


def _pass(plan: TrainPlan, hypers: Mapping[str, float], *, epochs: int, steps: int = 0) -> TrainPlan:
    """The plan of a pass beside the one for all, with as much time as that one; its own hyperparameters come first."""
    return TrainPlan(
        epochs,
        steps,
        plan.batch_size,
        {**plan.hypers, **hypers, **plan.personal.hypers},
        seconds=plan.seconds,
        schedule=plan.schedule,
    )


def _trained(
    task: Assignment,
    model: OwnModel,
    plan: TrainPlan,
    number: int,
    *,
    fixed: Collection[str] = (),
    anchor: OwnModel | None = None,
) -> OwnModel:
    """``model`` trained in place; its buffers are new."""
    result = task.trainer.train(
        model.parameters,
        task.train,
        plan,
        seed=task.seed + number,
        stop=task.stop,
        buffers=model.buffers,
        fixed=fixed,
        anchor=None if anchor is None else anchor.parameters,
    )
    if task.stop():
        raise TrainingError("stopped: the server has moved on")
    return OwnModel(result.local, result.buffers)


def _names(bundle: Bundle, role: str) -> frozenset[str]:
    return frozenset(parameter.name for parameter in bundle.manifest.parameters if parameter.role == role)

"""Control variates: what a device remembers of its own data corrects its gradients, so that clients do not drift apart.

With ``d`` the trained model less the received one, both methods are of one form: a vector is added to each gradient,
and what the device remembers from then on, ``-(vector + factor d)``, is an estimate of its gradient.

========  ====================  ================  ================================================================
method    vector                factor
========  ====================  ================  ================================================================
scaffold  ``c - c_i``           ``1 / distance``  Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II
feddyn    ``-g_i``              ``alpha``         Acar et al. 2021, arXiv 2111.04263, algorithm 1; ``mu`` is alpha
========  ====================  ================  ================================================================

``c`` comes with the model. `distance` is how far the steps go where each gradient is 1, so that ``-d / distance`` is
their mean gradient: with SGD the sum of their learning rates, ``K lr`` in the paper, and as exact with momentum,
where the mean weighs each gradient by how far it led, and with a proximal term, which is taken out of it. What is
decayed or clipped is a part of the gradient that is estimated: weight decay belongs to the objective, and a clipped
difference ``g - c_i + c`` is made up for over rounds. Adam's steps are no sums of gradients: the server refuses
scaffold with it. FedDyn's objective may be minimized by any rule; one that decouples weight decay (AdamW) decays
outside of it.

The device's estimate follows from its own ``d``; what the codec loses of it on the way is told by later updates.
"""

import math
import struct
from collections.abc import Mapping

import numpy as np

from edge_client.codec.layout import Layout, Vector
from edge_client.codec.quantize import peak
from edge_client.errors import CodecError
from edge_client.learning.assignment import Assignment
from edge_client.learning.remembered import pack_vector, unpack_vector
from edge_client.trainer import TrainResult
from edge_client.wire.messages import CORRECTION, DISTANCE

_RUN = struct.Struct("<Q")


def correction(task: Assignment) -> Vector | None:
    """What is added to each gradient of a task (``[n] float32``, new); None is zeros.

    Raises:
        CodecError: the control that came with the model is damaged.
    """
    plan, layout = task.plan, task.bundle.layout
    if plan.method == "sgd":
        return None
    own = remembered(task.recall(plan.method), layout, plan.run)
    return scaffold(own, task.received.control_vector(layout)) if plan.method == "scaffold" else feddyn(own)


def outcome(
    task: Assignment, vector: Vector | None, delta: Vector, result: TrainResult
) -> tuple[dict[str, float], dict[str, bytes]]:
    """What the update says of its steps and their correction, and what the device remembers if it is recorded.

    Args:
        task: the task.
        vector: what was added to each gradient.
        delta: the trained model less the received one; where it is not finite nothing new is remembered.
        result: of the training that led there.
    """
    plan, manifest = task.plan, task.bundle.manifest
    hypers = manifest.defaults() | plan.hypers
    far = result.distance
    if plan.schedule == "constant" and any(hypers.get(name) for name in ("momentum", "mu")):
        far = distance(manifest.optimizer.name, hypers, result.steps)
    said = {DISTANCE: far}
    if plan.method == "sgd":
        return said, {}
    said[CORRECTION] = 0.0 if vector is None else float(np.linalg.norm(vector))
    factor = hypers.get("mu", 0.0) if plan.method == "feddyn" else 1.0 / far if far else math.nan
    data = packed(following(vector, delta, factor), task.bundle.layout, plan.run)
    return said, {} if data is None else {plan.method: data}


def remembered(data: bytes | None, layout: Layout, run: int) -> Vector | None:
    """What the device remembers of its gradient, from the run of the federation with this number; None is nothing.

    What is damaged, or belongs to another layout or run, counts as nothing: a server that starts anew knows nothing of
    it, and the sum of all clients' would never agree with the server's.
    """
    if data is None or data[: _RUN.size] != _RUN.pack(run):
        return None
    try:
        return unpack_vector(data[_RUN.size :], layout)
    except CodecError:
        return None


def packed(vector: Vector, layout: Layout, run: int) -> bytes | None:
    """``vector`` for the device's store; None where it is not finite, and its update will be refused."""
    if not math.isfinite(peak(vector)):
        return None
    return _RUN.pack(run) + pack_vector(vector, layout)


def scaffold(own: Vector | None, common: Vector | None) -> Vector | None:
    """``c - c_i``, new; None is zeros, and so are arguments that are None."""
    if own is None:
        return None if common is None else common.copy()
    return -own if common is None else common - own


def feddyn(own: Vector | None) -> Vector | None:
    """``-g_i``, new; None is zeros."""
    return None if own is None else -own


def following(vector: Vector | None, delta: Vector, factor: float) -> Vector:
    """What to remember after a task in which ``vector`` was added to gradients, new: ``-(vector + factor delta)``.

    Not finite where ``delta`` is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = delta * np.float32(-factor)
        if vector is not None:
            found -= vector
    return found


def distance(optimizer: str, hypers: Mapping[str, float], steps: int) -> float:
    """How far so many steps go where each gradient is 1: ``lr ||a||_1`` of Wang et al. 2020, arXiv 2007.07481.

    At an even learning rate, of SGD, with momentum or not, by the name that the manifest has for it; the proximal term
    makes it less.
    """
    rate, pull = hypers.get("lr", 0.0), hypers.get("mu", 0.0)
    momentum = 0.0 if optimizer == "sgd" else hypers.get("momentum", 0.0)
    gone = velocity = 0.0
    for _ in range(steps):
        gradient = rate * (1.0 - pull * gone)
        velocity = momentum * velocity + gradient
        gone += gradient + momentum * velocity if optimizer == "nesterov" else velocity
    return gone

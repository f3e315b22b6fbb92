"""Local training: from the received model to an update."""

import dataclasses

import numpy as np

from edge_client.codec.layout import Vector
from edge_client.errors import TrainingError
from edge_client.learning import personal, variates
from edge_client.learning.assignment import Assignment, Learned
from edge_client.learning.own import OwnModel
from edge_client.learning.validation import EarlyStop, kept_aside
from edge_client.manifest import update_layouts
from edge_client.wire.messages import RECEIVED_LOSS


def train(task: Assignment) -> Learned:
    """Train as the plan says.

    Raises:
        CodecError: what came with the model is damaged.
        DataError: the data is empty, does not fit the bundle, or cannot keep any aside.
        TrainingError: the task was stopped, the bundle does not take what the plan's method asks for, or the runtime
            failed.
    """
    bundle, received, plan = task.bundle, task.received, task.plan
    source, aside = kept_aside(task.train, plan.validation) if plan.patience else (task.train, None)
    task = dataclasses.replace(task, train=source)
    # Without personal layers one vector is the received model, then the trained one, then the difference.
    own = personal.assembled(task)
    scalars: dict[str, float] = {}
    if plan.measure:
        found = task.trainer.evaluate(own.parameters, source, buffers=own.buffers)
        scalars[RECEIVED_LOSS] = found["loss"] / max(1.0, found["count"])
    own, fixed = personal.train_head(task, own)
    early = None
    if aside is not None:

        def loss(model: Vector, buffers: Vector) -> float:
            sums = task.trainer.evaluate(model, aside, buffers=buffers)
            return sums["loss"] / max(1.0, sums["count"])

        early = EarlyStop(loss, plan.patience, own.parameters, own.buffers)
    control = variates.correction(task)
    result = task.trainer.train(
        own.parameters,
        source,
        plan,
        seed=task.seed,
        stop=task.stop,
        buffers=own.buffers,
        control=control,
        after=early,
        fixed=fixed,
    )
    if task.stop():
        raise TrainingError("stopped: the server has moved on")
    if early is not None:
        result = early.settle(result)
        scalars |= {"validation.loss.before": early.before, "validation.loss.after": early.least}
    own = OwnModel(result.local, result.buffers)
    keeps, serves = personal.learned(task, own)
    delta, statistics = own.shared(bundle)
    np.subtract(delta, received.parameters(bundle.initial()), out=delta)
    scalars |= {
        "samples": float(result.samples),
        "steps": float(result.steps),
        "epochs": float(result.epochs),
        "seconds": result.seconds,
        "loss": result.loss,
    }
    scalars |= {f"sum.{name}": value for name, value in result.metrics.items()}
    said, settles = variates.outcome(task, control, delta, result)
    buffers = {"buffers": statistics} if "buffers" in update_layouts(bundle.manifest) else {}
    return Learned({"delta": delta, **buffers}, scalars | said, settles, keeps, serves)

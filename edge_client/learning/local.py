"""Local training: from the received model to an update."""

import numpy as np

from edge_client.codec.layout import Vector
from edge_client.errors import TrainingError
from edge_client.learning import variates
from edge_client.learning.assignment import Assignment, Learned
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
    # One vector is the received model, then the trained one, then the difference.
    vector = received.parameters(bundle.initial())
    scalars: dict[str, float] = {}
    source, aside = kept_aside(task.train, plan.validation) if plan.patience else (task.train, None)
    if plan.measure:
        found = task.trainer.evaluate(vector, source, buffers=received.buffers)
        scalars[RECEIVED_LOSS] = found["loss"] / max(1.0, found["count"])
    early = None
    if aside is not None:

        def loss(model: Vector, buffers: Vector) -> float:
            sums = task.trainer.evaluate(model, aside, buffers=buffers)
            return sums["loss"] / max(1.0, sums["count"])

        early = EarlyStop(loss, plan.patience, vector, received.buffers)
    control = variates.correction(task)
    result = task.trainer.train(
        vector, source, plan, seed=task.seed, stop=task.stop, buffers=received.buffers, control=control, after=early
    )
    if task.stop():
        raise TrainingError("stopped: the server has moved on")
    if early is not None:
        result = early.settle(result)
        scalars |= {"validation.loss.before": early.before, "validation.loss.after": early.least}
    delta = np.subtract(vector, received.parameters(bundle.initial()), out=vector)
    scalars |= {
        "samples": float(result.samples),
        "steps": float(result.steps),
        "distance": result.distance,
        "epochs": float(result.epochs),
        "seconds": result.seconds,
        "loss": result.loss,
    }
    scalars |= {f"sum.{name}": value for name, value in result.metrics.items()}
    said, settles = variates.outcome(task, control, delta, result)
    buffers = {"buffers": result.buffers} if "buffers" in update_layouts(bundle.manifest) else {}
    return Learned({"delta": delta, **buffers}, scalars | said, settles)

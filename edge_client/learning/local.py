"""Local training: from the received model to an update."""

import numpy as np

from edge_client.errors import TrainingError
from edge_client.learning.assignment import Assignment, Learned
from edge_client.manifest import update_layouts
from edge_client.wire.messages import RECEIVED_LOSS


def train(task: Assignment) -> Learned:
    """Train as the plan says.

    Raises:
        DataError: the data is empty, or does not fit the bundle.
        TrainingError: the task was stopped, or the runtime failed.
    """
    bundle, received = task.bundle, task.received
    # One vector is the received model, then the trained one, then the difference.
    vector = received.parameters(bundle.initial())
    scalars: dict[str, float] = {}
    if task.plan.measure:
        found = task.trainer.evaluate(vector, task.train, buffers=received.buffers)
        scalars[RECEIVED_LOSS] = found["loss"] / max(1.0, found["count"])
    result = task.trainer.train(vector, task.train, task.plan, seed=task.seed, stop=task.stop, buffers=received.buffers)
    if task.stop():
        raise TrainingError("stopped: the server has moved on")
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
    buffers = {"buffers": result.buffers} if "buffers" in update_layouts(bundle.manifest) else {}
    return Learned({"delta": delta, **buffers}, scalars)

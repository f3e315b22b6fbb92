"""Federated evaluation: what a model is worth on a device's own data."""

from edge_client.learning import personal
from edge_client.learning.assignment import Assignment, Learned
from edge_client.learning.disclosure import told
from edge_client.reporting import CONFUSION, HELD


def assess(task: Assignment) -> Learned:
    """Evaluate the received model, and the device's own where it has one, on the data that it does not train on.

    What the federation asks for beside it, and the device tells, is about the received model with the device's layers.

    Raises:
        DataError: the data does not fit the bundle.
        TrainingError: the task was stopped, or the runtime failed.
    """
    own = personal.assembled(task)
    sums = task.trainer.evaluate(own.parameters, task.test, buffers=own.buffers)
    scalars = {f"sum.{name}": value for name, value in sums.items()}
    serves = personal.served(task, own)
    if serves is not None:
        # Where some layers are personal there is no other model, and nothing to measure twice.
        whole = serves.model is own
        again = (
            sums if whole else task.trainer.evaluate(serves.model.parameters, task.test, buffers=serves.model.buffers)
        )
        scalars |= {f"personal.sum.{name}": value for name, value in again.items()}
    found = told(task, own.parameters, own.buffers)
    # More counts than samples are refused, and some of these may have come or gone since they were counted.
    scalars["samples"] = float(max(task.test.samples, found.tested))
    if found.vectors.keys() - {CONFUSION}:
        scalars[HELD] = float(max(task.train.samples, found.held))
    return Learned(found.vectors, scalars, serves=serves)

"""Federated evaluation: what a model is worth on a device's own data."""

from edge_client.learning.assignment import Assignment, Learned


def assess(task: Assignment) -> Learned:
    """Evaluate the received model on the data that the device does not train on.

    Raises:
        DataError: the data does not fit the bundle.
        TrainingError: the runtime failed.
    """
    vector = task.received.parameters(task.bundle.initial())
    sums = task.trainer.evaluate(vector, task.test, buffers=task.received.buffers)
    scalars = {f"sum.{name}": value for name, value in sums.items()} | {"samples": float(task.test.samples)}
    return Learned({}, scalars)

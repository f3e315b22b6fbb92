"""Early stopping: training ends when the loss on samples kept aside falls no more, and the best model counts."""

import dataclasses
from collections.abc import Callable

import numpy as np

from edge_client.codec.layout import Vector
from edge_client.data import DataSource, Splittable
from edge_client.errors import DataError
from edge_client.trainer import Epoch, TrainResult


def kept_aside(source: DataSource, share: float) -> tuple[DataSource, DataSource | None]:
    """What is trained on, and the ``share`` of the samples that is not: the same ones in every task.

    None where there are too few samples to keep one aside.

    Raises:
        DataError: it is a source of the user's own that cannot be split.
    """
    if not isinstance(source, Splittable):
        raise DataError(
            f"a data source of type {type(source).__name__} keeps nothing aside, as train.validation asks; "
            "give it a method apart(share), or arrays instead"
        )
    return source.apart(share)


class EarlyStop:
    """The best model so far, by the loss on samples kept aside; the model as received is the first.

    It holds a copy of that model and of its buffers. A loss that is NaN is never the best, and one that is as good as
    the best is not better.

    Args:
        loss: ``loss(model, buffers)``, the mean over what is kept aside.
        patience: so many epochs in a row without a better loss end training, 1 or more.
        model: as received, ``[trained.size] float32``.
        buffers: as received, ``[tracked.size] float32``.
    """

    def __init__(self, loss: Callable[[Vector, Vector], float], patience: int, model: Vector, buffers: Vector) -> None:
        self._loss = loss
        self._patience = patience
        self._worse = 0
        self._model = model.copy()
        self._best = Epoch(self._model, buffers.copy(), 0, 0.0)
        self.before = self.least = loss(model, buffers)
        """The losses of the model as received, and of the best one."""

    def __call__(self, epoch: Epoch) -> bool:
        """Look at the model after an epoch; whether training is to end."""
        found = self._loss(epoch.model, epoch.buffers)
        # Anything is better than NaN.
        if found < self.least or (found == found and self.least != self.least):
            np.copyto(self._model, epoch.model)
            self._best, self.least, self._worse = epoch._replace(model=self._model), found, 0
        else:
            self._worse += 1
        return self._worse >= self._patience

    def settle(self, result: TrainResult) -> TrainResult:
        """The result with the best model in place of the last: its weights, buffers, and the steps that led to it."""
        best = self._best
        np.copyto(result.local, best.model)
        return dataclasses.replace(result, buffers=best.buffers, steps=best.steps, distance=best.distance)

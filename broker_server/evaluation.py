"""How good the global model is on data that the server holds out."""

from typing import Self

from broker_server.metrics import combine
from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.data import DataSource, open_data
from edge_client.trainer import Trainer


class HeldOut:
    """The server's own evaluation, on data that no client trains on. One thread at a time may use it."""

    def __init__(self, bundle: Bundle, source: DataSource, *, batch_size: int = 256, threads: int = 1) -> None:
        self.source = source
        self._trainer = Trainer(bundle, threads=threads)
        self._batch_size = batch_size

    @classmethod
    def open(cls, bundle: Bundle, spec: str, *, batch_size: int = 256, threads: int = 1) -> Self:
        """Evaluate on the data that ``spec`` names (an npz file; see ``edge_client.data.open_data``).

        Raises:
            DataError: it cannot be read or does not fit the bundle.
        """
        return cls(bundle, open_data(spec, bundle.manifest), batch_size=batch_size, threads=threads)

    def evaluate(self, vector: Vector, *, buffers: Vector | None = None) -> dict[str, float]:
        """Metrics of the model ``vector`` (``[layout.size] float32``): ``loss``, ``accuracy`` where the bundle has it.

        ``buffers`` (flat float32) are the bundle's own unless given.
        """
        sums = self._trainer.evaluate(vector, self.source, batch_size=self._batch_size, buffers=buffers)
        return combine([sums])

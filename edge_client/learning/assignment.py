"""A task as learning sees it: what is to be done with which model and data, and what comes of it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.codec.model import Model
from edge_client.data import DataSource
from edge_client.learning.own import Served
from edge_client.reporting import USUAL
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan


@dataclass(frozen=True)
class Assignment:
    """One task of one client; nothing in it changes while it is done."""

    plan: TrainPlan
    seed: int
    """Of this client in this round: the same task again sees the same batches."""
    received: Model
    """The global model at the task's version."""
    trainer: Trainer
    train: DataSource
    test: DataSource
    recall: Callable[[str], bytes | None]
    """What the device has kept under a name, from the tasks before (`Store.recall`)."""
    stop: Callable[[], bool]
    """Asked between steps; once it is true the task ends with a TrainingError."""
    serves: bool = True
    """Whether programs on the device use what it learns: what nobody uses need not be made."""
    shares: Collection[str] = USUAL
    """What the device tells of its data where it is asked (`edge_client.reporting`)."""

    @property
    def bundle(self) -> Bundle:
        """The bundle that is trained."""
        return self.trainer.bundle


@dataclass(frozen=True)
class Learned:
    """What came of a task."""

    vectors: Mapping[str, Vector]
    """What is sent, by name; ``delta`` (``[layout.size] float32``, this client's own) is what the codec quantizes."""
    scalars: Mapping[str, float]
    settles: Mapping[str, bytes] = field(default_factory=dict)
    """What the device keeps of it if the update is recorded, by name; no bytes remove what there is."""
    keeps: Mapping[str, bytes] = field(default_factory=dict)
    """What the device keeps of it whatever becomes of the update."""
    serves: Served | None = None
    """The model that the device has for itself and serves in place of the global one."""

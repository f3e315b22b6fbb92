"""One task under way: its cohort, what each member has done, and what their results add up to."""

from dataclasses import dataclass, field
from typing import Literal

from broker_server.ledger import Task
from broker_server.metrics import combine
from edge_client.wire.messages import BlobRef

State = Literal["asked", "recording", "recorded", "gone"]


@dataclass
class OpenTask:
    """A task from its opening to its close.

    ``goal`` results end it; ``deadline`` is on the coordinator's clock; ``deltas`` holds, by the version that they
    start from, the blobs that lead to the task's version, and ``waiting`` the clients whose delta is not built yet.
    """

    task: Task
    goal: int
    deadline: float
    opened: bool = False
    members: dict[str, State] = field(default_factory=dict)
    invited: set[str] = field(default_factory=set)
    waiting: dict[int, list[str]] = field(default_factory=dict)
    deltas: dict[int, BlobRef] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    samples: int = 0

    @property
    def identity(self) -> tuple[int, int]:
        """Epoch and number, as the ledger knows it."""
        return self.task.epoch, self.task.task

    def count(self, *states: State) -> int:
        """How many members are in one of these states."""
        return sum(state in states for state in self.members.values())

    def blobs(self) -> list[BlobRef]:
        """Deltas that travel in chunks."""
        return [ref for ref in self.deltas.values() if ref.inline is None]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Metrics over all results, from the sums that they report."""
        sums = {name.removeprefix("sum."): total for name, total in self.sums.items() if name.startswith("sum.")}
        return {prefix + name: value for name, value in combine([sums]).items()}

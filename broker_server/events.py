"""What happens to a federation, and what its server does about it: the coordinator's start, events and actions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from broker_server.records import Round, Task
from broker_server.steering import Adopt as Adopt
from broker_server.steering import Say as Say
from broker_server.steering import Seen as Seen
from broker_server.steering import Steered as Steered
from edge_client.events import Clock as Clock
from edge_client.events import Connected as Connected
from edge_client.events import Disconnected as Disconnected
from edge_client.events import Log as Log
from edge_client.events import Publish as Publish
from edge_client.events import Received as Received
from edge_client.events import Subscribe as Subscribe
from edge_client.events import Tick as Tick
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import Checklist

# The start.


@dataclass(frozen=True)
class Restored:
    """What the ledger knows when the server starts."""

    epoch: int
    version: int
    digest: bytes
    bundle: BlobRef
    update_limit: int
    """Bytes of the largest update."""
    last_task: int = 0
    rounds: tuple[Round, ...] = ()
    unfinished: int | None = None
    """The last round's number where its model is there and its evaluation is not."""
    open_tasks: tuple[Task, ...] = ()
    """The tasks that were under way, one at most in synchronous rounds; their recorded updates follow as Recorded."""
    digests: Mapping[int, bytes] = field(default_factory=dict)
    """Of the versions that these tasks work on."""
    leftovers: tuple[str, ...] = ()
    """Topics on which an earlier run may have left chunks."""
    uploads: Mapping[str, Checklist] = field(default_factory=dict)
    """By client, what has come of updates for the task that was under way."""
    fleet: int = 0
    """Clients that were there at the end of the last round."""
    voids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By client, the task that its last recorded update was for, where that is void."""
    pace: float = 0.0
    """As in `Aggregated`."""
    issued: float = 0.0
    """The date of the newest offer, seconds since 1970; 0 where none had one."""
    run: int = 0
    """As in `TrainPlan`."""

    @property
    def open_task(self) -> Task | None:
        """The newest of the tasks that were under way."""
        return self.open_tasks[-1] if self.open_tasks else None


# Events.


@dataclass(frozen=True)
class Rekeyed:
    """What is known of clients' keys has changed: some have one now, or another one; and some have none any more."""

    given: tuple[str, ...]
    gone: tuple[str, ...]


@dataclass(frozen=True)
class Opened:
    """A task, or the enlargement of its cohort, is in the ledger: its members may be invited."""

    epoch: int
    task: int


@dataclass(frozen=True)
class Recorded:
    """An update is in the ledger and in the running sum."""

    epoch: int
    task: int
    client: str
    samples: int
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class Refused:
    """An update cannot be used; ``reason`` goes into its receipt."""

    epoch: int
    task: int
    client: str
    reason: str


@dataclass(frozen=True)
class Damaged:
    """The chunks of an update do not make up what was announced; they are forgotten."""

    epoch: int
    task: int
    client: str


@dataclass(frozen=True)
class Answered:
    """What the ledger says of an update to a task that is not open."""

    epoch: int
    task: int
    client: str
    status: Literal["recorded", "late", "void"]


@dataclass(frozen=True)
class Prepared:
    """The delta from version ``held`` to ``version`` is built; ``ref`` is its blob."""

    held: int
    version: int
    ref: BlobRef


@dataclass(frozen=True)
class Aggregated:
    """A new version of the global model is in the ledger, and its tasks are closed.

    ``clipped`` counts the parameters that would have gone out of all bounds and stay where they were. ``pace`` is that
    of the publication: about the standard deviation of an element of rounds' aggregates, 0 where it is not known.
    """

    version: int
    digest: bytes
    clipped: int = 0
    pace: float = 0.0


@dataclass(frozen=True)
class Closed:
    """A task is closed in the ledger, without a new version."""

    epoch: int
    task: int


@dataclass(frozen=True)
class Evaluated:
    """The global model's metrics on the server's held-out data."""

    version: int
    metrics: Mapping[str, float]


Event = (
    Connected
    | Disconnected
    | Received
    | Clock
    | Tick
    | Rekeyed
    | Steered
    | Say
    | Opened
    | Recorded
    | Refused
    | Damaged
    | Answered
    | Prepared
    | Aggregated
    | Closed
    | Evaluated
)


# Actions.


@dataclass(frozen=True)
class Retain:
    """Publish a retained message; an empty payload clears it."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class OpenTask:
    """Write a task to the ledger; answer with Opened."""

    task: Task


@dataclass(frozen=True)
class Enlarge:
    """Add members to a task's cohort in the ledger; answer with Opened."""

    epoch: int
    task: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Keep:
    """Keep one chunk of a client's update until the update is recorded or its task closed."""

    epoch: int
    task: int
    client: str
    ref: BlobRef
    index: int
    data: bytes


@dataclass(frozen=True)
class Record:
    """Check an update, write it to the ledger and add it to the sum; answer with Recorded, Refused or Damaged.

    ``data`` None: it is in the chunks that were kept.
    """

    epoch: int
    task: int
    client: str
    data: bytes | None


@dataclass(frozen=True)
class Inquire:
    """Look up an update to a task that is not open; answer with Answered, "late" where the ledger has forgotten it."""

    epoch: int
    task: int
    client: str


@dataclass(frozen=True)
class Prepare:
    """Build the delta from version ``held`` to ``version``; answer with Prepared."""

    held: int
    version: int


@dataclass(frozen=True)
class Aggregate:
    """Turn the sum into the next version; answer with Aggregated. Versions not in ``keep`` may be forgotten.

    ``closes`` are the tasks, by epoch and number, whose updates are in the sum, and which end with it.
    ``result`` is what is known of the round so far. It goes into the ledger with the version, so that a server which
    dies before the round is finished measures and finishes it, and does not run it again.
    """

    closes: tuple[tuple[int, int], ...]
    result: Round
    keep: frozenset[int]


@dataclass(frozen=True)
class CloseTask:
    """Close a task without a new version: done when it was an evaluation, void when too few updates came.

    Answer with Closed.
    """

    epoch: int
    task: int
    outcome: Literal["done", "void"]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a version on the server's held-out data; answer with Evaluated."""

    version: int


@dataclass(frozen=True)
class Spread:
    """Retain these chunks of a built blob on the broker, all of them when ``indices`` is None."""

    ref: BlobRef
    indices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sweep:
    """Clear a blob's chunks from the broker and forget it."""

    ref: BlobRef


@dataclass(frozen=True)
class Clear:
    """Clear topics on which an earlier run left chunks, and forget them."""

    topics: tuple[str, ...]


@dataclass(frozen=True)
class Dated:
    """An offer is dated so, seconds since 1970; no later one may have an earlier date, of this epoch or of another."""

    issued: float


@dataclass(frozen=True)
class FinishRound:
    """Write a round's result to the ledger; ``best`` says whether its version is the best so far.

    ``fleet`` is how many clients are there.
    """

    result: Round
    best: bool
    fleet: int = 0


@dataclass(frozen=True)
class Misconduct:
    """Write to the ledger what a client did: it is muted for so many seconds, or there are two of it."""

    client: str
    kind: Literal["muted", "twin"]
    reason: str
    seconds: float


@dataclass(frozen=True)
class Fenced:
    """Another server of this federation has a higher epoch, and clients follow it: end, and leave its topics alone."""

    epoch: int


@dataclass(frozen=True)
class Stop:
    """A stop condition holds."""

    reason: str


Action = (
    Publish
    | Subscribe
    | Log
    | Retain
    | OpenTask
    | Enlarge
    | Keep
    | Record
    | Inquire
    | Prepare
    | Aggregate
    | CloseTask
    | Evaluate
    | Spread
    | Sweep
    | Clear
    | Dated
    | FinishRound
    | Misconduct
    | Seen
    | Adopt
    | Fenced
    | Stop
)

"""What happens to a client, and what it does about it: the session's events and actions."""

from dataclasses import dataclass

from edge_client.wire import messages as m
from edge_client.wire.envelope import Stamp

# Events.


@dataclass(frozen=True)
class Connected:
    """The broker has accepted the connection; nothing is subscribed to."""


@dataclass(frozen=True)
class Disconnected:
    """The connection is gone."""


@dataclass(frozen=True)
class Received:
    """A message from the broker."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Counted:
    """What the transport has counted so far; precedes events that make the client speak."""

    traffic: m.Traffic


@dataclass(frozen=True)
class Clock:
    """What the clock on the wall shows, in seconds since 1970; precedes events where offers have dates."""

    wall: float


@dataclass(frozen=True)
class Installed:
    """The bundle is open, fits the client's data, and is stored; the client holds its weights as version 0."""

    bundle: bytes
    samples: int
    """Training samples that the client has for it."""


@dataclass(frozen=True)
class Rejected:
    """The bundle cannot be used on this device."""

    bundle: bytes
    reason: str


@dataclass(frozen=True)
class Finished:
    """A task is done: its encoded update is stored, and the client now holds the task's version."""

    epoch: int
    task: int
    update: bytes
    version: int
    digest: bytes


@dataclass(frozen=True)
class Failed:
    """A task could not be done; ``version`` and ``digest`` say what the client holds now."""

    epoch: int
    task: int
    reason: str
    version: int
    digest: bytes


@dataclass(frozen=True)
class Available:
    """Whether the device may train now (power, network, its owner) has changed, or what it has to train on."""

    available: bool
    samples: int | None = None
    """Samples to train on now; None is as many as before."""


@dataclass(frozen=True)
class Lacking:
    """Chunks of a published blob that the driver pulls by itself do not come."""

    sha256: bytes
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Tick:
    """Time has passed; due at ``ClientSession.wake``."""


Event = (
    Connected
    | Disconnected
    | Received
    | Counted
    | Clock
    | Installed
    | Rejected
    | Finished
    | Failed
    | Available
    | Lacking
    | Tick
)


# Actions.


@dataclass(frozen=True)
class Subscribe:
    """Subscribe to exact topics, in one packet."""

    topics: tuple[str, ...]


@dataclass(frozen=True)
class Unsubscribe:
    """Unsubscribe from exact topics, in one packet."""

    topics: tuple[str, ...]


@dataclass(frozen=True)
class Publish:
    """Publish to a topic, not retained."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Install:
    """Open, check and store this bundle; answer with Installed or Rejected."""

    bundle: bytes
    data: bytes


@dataclass(frozen=True)
class Work:
    """Bring the model to the task's version and do the task; answer with Finished or Failed."""

    invitation: m.Invitation
    delta: bytes | None


@dataclass(frozen=True)
class Cancel:
    """Stop the task under way soon; it is still answered with Finished or Failed."""


@dataclass(frozen=True)
class Settle:
    """The fate of an update is known: keep what its encoding left over when it was recorded, else restore what was."""

    epoch: int
    task: int
    recorded: bool


@dataclass(frozen=True)
class Keep:
    """Keep a chunk of a blob on its way down, for a later life of the client; an attempt is enough."""

    ref: m.BlobRef
    index: int
    data: bytes


@dataclass(frozen=True)
class Discard:
    """The chunks that were kept are not needed any more."""


@dataclass(frozen=True)
class Witness:
    """Remember this offer, and when it was issued, over power cuts: no older one is believed from now on."""

    stamp: Stamp
    issued: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Announced:
    """The server asks the device to install this release; whoever installs it believes its signature alone."""

    release: m.Release


@dataclass(frozen=True)
class Log:
    """One line for the operator."""

    text: str


@dataclass(frozen=True)
class Done:
    """The federation has reached its end; a driver may leave or wait for another."""


Action = (
    Subscribe
    | Unsubscribe
    | Publish
    | Install
    | Work
    | Cancel
    | Settle
    | Keep
    | Discard
    | Witness
    | Announced
    | Log
    | Done
)

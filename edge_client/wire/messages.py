"""Every message as a typed struct, in one numbered table; how it is wrapped and signed is in `envelope`.

Decoding checks the type, length and range of each field; a payload that breaks any of them raises WireError.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edge_client.errors import WireError
from edge_client.wire import envelope
from edge_client.wire.envelope import MESSAGE_LIMIT as MESSAGE_LIMIT
from edge_client.wire.envelope import PROTOCOL as PROTOCOL
from edge_client.wire.envelope import Natural

INLINE_LIMIT = 16 * 1024
"""Bytes of a blob that may travel inside a message."""
CHUNK_MIN, CHUNK_MAX = 1024, 1024 * 1024
RECEIVED_LOSS = "loss.received"
"""The scalar of an update that holds the mean loss of the model as received, where `TrainPlan.measure` asks for it."""
DISTANCE = "distance"
"""The scalar that says how far the steps of an update go where each gradient is 1: with SGD the sum of their learning
rates, with momentum more. Of Adam, whose steps are no sums of gradients, and of momentum while a schedule lets the rate
fall, it is the sum of the rates too."""
CORRECTION = "correction"
"""The scalar that says how long (L2) the vector was that `TrainPlan.method` had added to each gradient."""

FederationName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Seconds = Annotated[float, Meta(ge=0, le=1e8)]
Moment = Annotated[float, Meta(ge=0, le=1e11)]
"""Seconds since 1970."""
Text = Annotated[str, Meta(max_length=500)]
Version = Annotated[str, Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}\Z")]
"""A version of the client; also a folder's name."""
PLATFORM = r"^(?:[a-z]{2}[0-9]{1,4}-[a-z0-9_]{1,32})?\Z"
Hypers = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[float, Meta(ge=-1e30, le=1e30)]], Meta(max_length=64)
]
Indices = Annotated[tuple[Natural, ...], Meta(max_length=4096)]


class BlobRef(Struct, frozen=True, array_like=True):
    """A blob by its SHA-256, its size in bytes and the size of its chunks; the bytes themselves where they are few."""

    sha256: Hash
    size: Natural
    chunk: Annotated[int, Meta(ge=CHUNK_MIN, le=CHUNK_MAX)]
    inline: Annotated[bytes, Meta(max_length=INLINE_LIMIT)] | None = None


class PersonalPlan(Struct, frozen=True, array_like=True):
    """What a client learns for itself alone, beside what it learns for all (`edge_client.learning.personal`)."""

    method: Literal["none", "ditto", "fine-tune"] = "none"
    """Whether it has a whole model of its own, and how that comes about."""
    epochs: Annotated[int, Meta(ge=1, le=10_000)] = 1
    """Over its data, for that model."""
    steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    """Mini-batches in place of ``epochs``, where this is not zero."""
    pull: Annotated[float, Meta(ge=0, le=1e30)] = 0.0
    """Lambda of Ditto: how strongly the model of its own is held near the global one."""
    head_epochs: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """Over its data for the personal layers alone, before the others are trained without them; 0 trains all at once."""
    hypers: Hypers = {}
    """Override those of the plan for what it learns for itself alone."""


class ReportPlan(Struct, frozen=True, array_like=True):
    """What a client is asked to tell in evaluations beside sums of metrics (see `edge_client.reporting`).

    It is asked for; what a client tells is for its owner to say.
    """

    confusion: bool = False
    labels: bool = False
    bins: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Of the histograms of inputs; 0 asks for none."""
    low: Annotated[float, Meta(ge=-1e30, le=1e30)] = 0.0
    high: Annotated[float, Meta(ge=-1e30, le=1e30)] = 1.0
    """The range that the bins share, in what the model sees."""


class TrainPlan(Struct, frozen=True, array_like=True):
    """How a client trains: ``epochs`` over its data, or exactly ``steps`` mini-batches where that is not zero.

    ``hypers`` override the defaults of the bundle's scalar inputs by name (``lr``, ``momentum``, ``mu`` and the like).
    """

    epochs: Annotated[int, Meta(ge=1, le=10_000)] = 1
    steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    batch_size: Annotated[int, Meta(ge=1, le=65_536)] = 32
    hypers: Hypers = {}
    measure: bool = False
    """Before it trains, the client measures the model as received on what it trains on: `RECEIVED_LOSS`."""
    method: Literal["sgd", "scaffold", "feddyn"] = "sgd"
    """Whether gradients are corrected by what the client remembers, and by whose rule."""
    seconds: Annotated[float, Meta(ge=0, le=1e8)] = 0.0
    """Training ends with the first step after so many seconds; 0 is no bound."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the steps of the task."""
    validation: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of its training data that the client keeps aside to see when to stop."""
    patience: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """Epochs in a row without a better loss on ``validation`` that end training, with the best model; 0 is never."""
    personal: PersonalPlan = PersonalPlan()
    report: ReportPlan = ReportPlan()
    run: Natural = 0
    """Of all tasks from one ledger the same: what a device remembers of its part in another run does not fit this."""


class UpdatePlan(Struct, frozen=True, array_like=True):
    """How this client encodes its update; the first three as in `edge_client.codec.update.CodecSettings`.

    ``value`` is checked against its target's bounds where the update is encoded.
    """

    kind: Literal["quantized", "none"] = "quantized"
    target: Literal["bits", "nmse", "bytes", "step", "absolute"] = "nmse"
    value: Annotated[float, Meta(gt=0, le=1e12)] = 0.1
    feedback: Literal["residual", "length", "none"] = "residual"
    """What becomes of what the encoding loses: it is kept and added to the next update (error feedback); or forgotten,
    and the update made as long as if nothing were lost; or just forgotten."""
    limit: Annotated[int, Meta(ge=0, le=2**34)] = 0
    """Bytes that a quantized update may have at most, because the client's link is slow; 0 is no limit."""


class Traffic(Struct, frozen=True, array_like=True):
    """Bytes that a client's transport has counted since the client started."""

    sent: Natural = 0
    received: Natural = 0


class Progress(Struct, frozen=True, array_like=True):
    """How far a device is with a release of its client."""

    version: Version
    stage: Literal["fetching", "staged", "trial", "healthy", "refused", "back"]
    """On its way; left to be installed; runs and is watched; is the client; not installed; the one before runs."""
    detail: Text = ""
    release: Annotated[bytes, Meta(max_length=8)] = b""
    """The first bytes of the SHA-256 of its record: which release of that version."""


class Condition(Struct, frozen=True, array_like=True):
    """How a device is, as far as it tells; None is not known."""

    degrees: Annotated[float, Meta(ge=-273, le=1000)] | None = None
    """The hottest sensor, in degrees Celsius."""
    disk: Natural | None = None
    """Bytes free where its state is."""
    memory: Natural | None = None
    """Bytes of memory that may still be had."""
    written: Natural | None = None
    """Bytes that the client writes to the disk in a day."""
    rests: Text = ""
    """Why it does not train; empty where it may."""
    platform: Annotated[str, Meta(pattern=PLATFORM)] = ""
    """What a release must be for, as ``cp311-aarch64``; empty where the device cannot be updated from the server."""
    progress: Progress | None = None


# From a client to the server.


class Hello(Struct, frozen=True, array_like=True):
    """What a client is and holds; the answer to each epoch's offer, and repeated while it is idle."""

    epoch: Natural
    boot: Annotated[bytes, Meta(min_length=8, max_length=8)]
    """Random for each start of the client, so that an old last will does not end a new life."""
    bundle: Hash
    version: Natural
    digest: Hash
    samples: Natural
    available: bool
    traffic: Traffic = Traffic()
    software: Annotated[str, Meta(max_length=64)] = ""
    uplink: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    """Bytes a second that the client can send, as far as it knows; 0 is not known."""
    condition: Condition = Condition()


class Goodbye(Struct, frozen=True, array_like=True):
    """A client leaves; also its last will."""

    boot: Annotated[bytes, Meta(min_length=8, max_length=8)]


class Upload(Struct, frozen=True, array_like=True):
    """A client's result of a task: the encoded update inline, or an announcement of its blob."""

    epoch: Natural
    task: Natural
    blob: BlobRef
    traffic: Traffic = Traffic()


class Decline(Struct, frozen=True, array_like=True):
    """A client cannot do a task."""

    epoch: Natural
    task: Natural
    reason: Text


class Missing(Struct, frozen=True, array_like=True):
    """Chunks of a published blob that a client subscribed to and did not get."""

    sha256: Hash
    indices: Indices


# From the server to clients.


class Offer(Struct, frozen=True, array_like=True):
    """What the federation is about; retained. A higher epoch replaces everything said under a lower one.

    It does not name the model's version: that would fan one message out to the whole fleet each round. A client learns
    the version with its invitation, the only moment at which it matters.
    """

    federation: FederationName
    epoch: Natural
    bundle: BlobRef
    spread: Seconds
    """A client waits a random part of this before it answers, so that a fleet does not answer as one."""
    heartbeat: Annotated[float, Meta(ge=1, le=1e6)] = 300.0
    finished: bool = False
    issued: Moment = 0.0
    expires: Moment = 0.0
    """When it was said and until when it holds; 0 where the federation does not sign, and it has no date."""


class Invitation(Struct, frozen=True, array_like=True):
    """One task for one client."""

    epoch: Natural
    task: Natural
    round: Natural
    kind: Literal["train", "evaluate"]
    plan: TrainPlan
    update: UpdatePlan
    seed: Natural
    deadline: Seconds
    held: Natural
    """The version that ``delta`` starts from: the one that the client said it holds."""
    version: Natural
    digest: Hash
    delta: BlobRef | None = None
    """Leads from ``held`` to ``version``; none where they are the same."""
    void: tuple[Natural, Natural] | None = None
    """Epoch and number of the void task that this client's last recorded update was for: it does not count."""


class Credit(Struct, frozen=True, array_like=True):
    """Leave to send these chunks of an announced blob now."""

    sha256: Hash
    indices: Indices


class Receipt(Struct, frozen=True, array_like=True):
    """What became of an update: recorded (durably, and counted once), late, refused (``detail`` says why) or void."""

    epoch: Natural
    task: Natural
    status: Literal["recorded", "late", "refused", "void"]
    detail: Text = ""


class Release(Struct, frozen=True, array_like=True):
    """A new release of the client for this device to install, signed for whoever installs it there."""

    record: Annotated[bytes, Meta(max_length=INLINE_LIMIT)]
    """What it is, as `edge_client.trust.release` packs it."""
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]
    """The federation's, over the record; beside the one that the message may have."""


Message = Hello | Goodbye | Upload | Decline | Missing | Offer | Invitation | Credit | Receipt | Release

TABLE: dict[int, type[Struct]] = {
    1: Hello,
    2: Goodbye,
    3: Upload,
    4: Decline,
    5: Missing,
    6: Offer,
    7: Invitation,
    8: Credit,
    9: Receipt,
    10: Release,
}
_NUMBERS = {kind: number for number, kind in TABLE.items()}
_DECODERS: dict[int, msgspec.msgpack.Decoder[Any]] = {
    number: msgspec.msgpack.Decoder(kind) for number, kind in TABLE.items()
}


_ENCODER = msgspec.msgpack.Encoder()


def pack(message: Message) -> tuple[int, bytes]:
    """A message's number and body."""
    return _NUMBERS[type(message)], _ENCODER.encode(message)


def unpack(wrapped: envelope.Envelope) -> Message:
    """The message in an envelope.

    Raises:
        WireError: there is none of that number, or a field is out of bounds.
    """
    decoder = _DECODERS.get(wrapped.number)
    if decoder is None:
        raise WireError(f"message number {wrapped.number}; known are 1 to {max(TABLE)}")
    try:
        message: Message = decoder.decode(wrapped.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{TABLE[wrapped.number].__name__}: {error}") from error
    return message


def encode(message: Message) -> bytes:
    """One message as bytes, not signed."""
    return envelope.wrap(*pack(message))


def decode(payload: bytes) -> Message:
    """One message from bytes, whoever says it and whether it is signed or not.

    Raises:
        WireError: the payload is too long, is not a message, is of another protocol, or a field is out of bounds.
    """
    return unpack(envelope.unwrap(payload))

"""The federation's settings: one TOML file, read once into frozen structs, every mistake named by its dotted key."""

import math
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from broker_server.analytics import Analytics, Evaluation
from broker_server.consistency import VALUES, check_together
from broker_server.metrics import higher_is_better
from broker_server.personal import Personal
from broker_server.sections import (
    Bytes,
    ClientPattern,
    Count,
    Duration,
    Factor,
    Option,
    Positive,
    Rate,
    Seconds,
    Share,
    Word,
)
from broker_server.training import Schedule, Train
from broker_server.validation import check_keys
from edge_client.errors import ConfigError


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, strict about its keys (mypy wants ``frozen`` repeated)."""


class Identity(_Section, frozen=True):
    """``[federation]``: what is trained, and where its state lives. Paths are absolute once loaded."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
    bundle: str
    state: str = "state"
    seed: Annotated[int, Meta(ge=0, le=2**62)] = 0


class Broker(_Section, frozen=True):
    """``[broker]``: the one named by ``url``; else an embedded one, on loopback unless ``trust.authority`` is set."""

    url: Annotated[str, Meta(pattern=r"^\Z|^mqtts?://[^/\s]+\Z")] = ""
    kind: Literal["auto", "mosquitto", "amqtt"] = "auto"
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """0 picks a free one."""
    username: str = ""
    password_file: str = ""
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    """In place of what ``trust.authority`` has: the authority of the broker's certificate, and the server's own."""


class Round(_Section, frozen=True):
    """``[round]``: who is asked, how many answers are wanted, and how long the server waits for them."""

    mode: Literal["synchronous", "buffered", "evaluation"] = "synchronous"
    """Rounds, in which a cohort trains the same version; or none: clients train all the time, each from the version
    that is the newest when it is asked, and every ``buffer`` updates make the next one. Or nobody trains: the newest
    version is evaluated, as ``[evaluation]`` says."""
    cohort: Positive = 10
    """Updates that end the round (the goal count)."""
    over_select: Annotated[float, Meta(ge=1, le=10)] = 1.0
    deadline: Seconds = 600.0
    minimum: Positive = 1
    """With fewer updates at the deadline the round is void."""
    clients: Count = 0
    """Clients that must have said hello before the first round; 0 means ``cohort``, or ``buffer`` where buffered."""
    concurrency: Positive = 20
    """Buffered: clients that train at once."""
    buffer: Positive = 10
    """Buffered: updates that make a new version."""
    staleness: Annotated[float, Meta(ge=0, le=100)] = 0.5
    """Buffered: an update s versions old counts (1 + s)^-staleness times."""
    max_staleness: Count = 20
    """Buffered: an update that is more versions old is refused."""

    @property
    def invited(self) -> int:
        """Clients invited to one round."""
        return math.ceil(self.cohort * self.over_select)

    @property
    def quorum(self) -> int:
        """Clients that must be there before the first round starts."""
        return self.clients or (min(self.buffer, self.concurrency) if self.mode == "buffered" else self.cohort)


class Aggregation(_Section, frozen=True):
    """``[aggregation]``: how updates become one."""

    algorithm: str = "fedavg"
    """One of the registry's (`aggregation.registry`), or ``module:attribute`` for one of your own."""
    options: dict[Word, Option] = {}
    """What the algorithm takes."""
    weights: Literal["samples", "uniform"] = "samples"
    clients: dict[ClientPattern, Factor] = {}
    """Weights times a factor for some clients, by id or by pattern (``pi-*``); the first that fits holds."""
    norm: Annotated[float, Meta(ge=0, le=1e30)] = 0.0
    """Norm bounding: an update with a larger norm (L2) is shortened to it; 0 is no bound."""


class ServerStep(_Section, frozen=True):
    """``[server]``: how far the model moves along what updates became."""

    optimizer: str = "sgd"
    """One of the registry's (`aggregation.registry`), or ``module:attribute`` for one of your own."""
    options: dict[Word, Option] = {}
    """What the optimizer takes."""
    learning_rate: Annotated[float, Meta(gt=0, le=1000)] | None = None
    """Unless given 1 with sgd, and 0.01 with those that divide by what aggregates usually are."""
    schedule: Schedule = Schedule()


class Codec(_Section, frozen=True):
    """``[codec]``: the rate of updates and of the global model."""

    kind: Literal["quantized", "none"] = "quantized"
    target: Literal["bits", "nmse", "bytes", "step", "cohort"] = "nmse"
    """What ``value`` says of an update: its bits a parameter, its noise (energy of what is lost over that of the
    update), its bytes, or its quantization step (in root mean squares of the update). Or, with ``cohort``, what it says
    of the aggregate: its step in standard deviations of aggregates; clients that weigh little in it tell little."""
    value: Rate | None = None
    """Unless given 0.1 with ``nmse`` and 2 with ``cohort``; the others have no default."""
    clients: dict[ClientPattern, Rate] = {}
    """Other values for some clients, by id or by pattern (``pi-*``); the first that fits holds."""
    upload_seconds: Duration = 0.0
    """Seconds that an update may take on the link of its client, where the client says how fast that is: it gets fewer
    bits where ``value`` would take longer. 0 is no bound."""
    feedback: Literal["residual", "length", "none"] = "residual"
    """A client carries what quantization left over into its next update; or, where most come once, makes the update as
    long as if nothing were left over; or neither."""
    model_step: Factor = 30.0
    """Quantization step of the global model's versions, in standard deviations of a round's global update."""
    model_noise: Annotated[float, Meta(gt=0, lt=1)] = 0.07
    """What a version leaves out, for later ones to tell, has at most about this share of the energy of all that the
    model has learned: the first rounds are told more finely."""

    def rate(self, client: str) -> float:
        """The value of ``target`` for one client."""
        fitting = (value for pattern, value in self.clients.items() if fnmatchcase(client, pattern))
        return next(fitting, self.value or VALUES.get(self.target, math.nan))

    def limit(self, uplink: float) -> int:
        """Bytes that an update may have over a link of ``uplink`` bytes a second; 0 where nothing bounds them."""
        if not uplink or not self.upload_seconds:
            return 0
        return int(min(max(1.0, uplink * self.upload_seconds), 2.0**34))


class Stop(_Section, frozen=True):
    """``[stop]``: the run ends when one of these holds; 0 switches a condition off."""

    rounds: Count = 100
    metric: Word = "accuracy"
    target: float | None = None
    patience: Count = 0
    """Evaluations in a row without a better ``metric``."""
    seconds: Duration = 0.0
    bytes: Bytes = 0
    """Budget of bytes up and down together."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of ``metric`` is the better one: not so for losses, errors and spreads."""
        return higher_is_better(self.metric)

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` beats ``best``; NaN never does, anything else beats None."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value > best if self.higher_is_better else value < best

    def reached(self, value: float) -> bool:
        """Whether ``value`` meets ``target``."""
        if self.target is None:
            return False
        return value >= self.target if self.higher_is_better else value <= self.target


class Transfer(_Section, frozen=True):
    """``[transfer]``: how blobs cross the broker."""

    chunk: Annotated[int, Meta(ge=1024, le=1_048_576)] = 65_536
    """Bytes in one chunk; fewer where the broker takes no larger messages."""
    window: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Chunks that one client may have under way."""
    uploads: Annotated[int, Meta(ge=1, le=100_000)] = 16
    """Clients that may upload at once."""
    inline: Annotated[int, Meta(ge=0, le=16_384)] = 16_384
    """Bytes up to which a blob travels inside its message."""
    spread: Annotated[float, Meta(ge=0, le=3600)] = 1.0
    """Seconds over which clients spread their answers to a new offer."""


class Trust(_Section, frozen=True):
    """``[trust]``: whose word is believed."""

    authority: str = ""
    """The folder that `fedge ca init` made; without one nothing is signed, and who reaches the broker is believed."""
    offer_days: Annotated[float, Meta(gt=0, le=3650)] = 7.0
    """Days that a signed offer holds; it is said anew long before."""
    approve: Literal["claim", "ask"] | tuple[ClientPattern, ...] = "claim"
    """Who is enrolled without being approved: whoever has a claim, nobody, or ids that fit one of the patterns."""
    certificate_days: Annotated[float, Meta(gt=0, le=3650)] = 365.0
    """Days that a device's certificate holds; it is renewed in the last third of them."""


class Limits(_Section, frozen=True):
    """``[limits]``: what is taken from one client, and what it may do before it is not listened to for a while."""

    norm: Annotated[float, Meta(ge=0, le=1e30)] = 0.0
    """The largest norm (L2) of an update that is taken; 0 is no bound."""
    samples: Count = 0
    """As how many samples one client counts at most, whatever it says that it has: what it says cannot be checked, and
    its update weighs as much. 0 is no bound; set it to about what your largest honest client has."""
    messages: Rate = 50.0
    """Messages a second, beside the chunks that the server asks for; a few seconds' worth may come at once."""
    bytes: Rate = 2_000_000.0
    """Bytes a second of these messages."""
    strikes: Annotated[float, Meta(ge=1, le=1e9)] = 10.0
    """What breaks the protocol, is not believed or cannot be used counts one each, and is forgiven one a minute; so
    many mute the client."""
    mute_seconds: Seconds = 60.0
    """How long, for the first time; each time doubles it, up to an hour with the default."""
    turn: Seconds = 30.0
    """Seconds after which a client that uploads makes way for one that waits."""

    def count(self, samples: int) -> int:
        """As how many samples a client counts that says it has so many."""
        return min(samples, self.samples or samples)


class Simulation(_Section, frozen=True):
    """``[simulation]``: emulated phones, their data and their troubles."""

    clients: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    data: str = ""
    """An npz file or ``module:callable``."""
    split: Literal["iid", "dirichlet", "shards", "natural"] = "iid"
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 0.3
    shards: Annotated[int, Meta(ge=1, le=1000)] = 2
    key: str = "user"
    """The npz key that holds each sample's user, for the natural split."""
    label: str = "y"
    """The npz key that holds each sample's class, for the splits by label."""
    test_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the samples kept for the server's evaluation where ``evaluation.data`` is empty."""
    holdout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of each phone's samples that it evaluates on instead of training."""
    share: str = ""
    """What each phone tells of its data where ``[analytics]`` asks: ``labels``, ``features``, both, or ``nothing``."""
    slots: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Phones that train at once; 0 means one for each core."""
    availability: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of the time that a phone may train."""
    dropout: Share = 0.0
    """Probability that a phone abandons a task."""
    speed: tuple[Factor, Factor] = (1.0, 1.0)
    """Slowest and fastest phone, as factors of this machine's speed."""
    bandwidth: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    """Bytes per second in each direction; 0 means unlimited."""
    latency: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    """Seconds in each direction."""
    identities: str = ""
    """A folder with the identity of each phone, by its name, where the broker asks for certificates."""


class Federation(_Section, frozen=True):
    """All settings of one federation."""

    federation: Identity
    broker: Broker = Broker()
    round: Round = Round()
    train: Train = Train()
    personal: Personal = Personal()
    aggregation: Aggregation = Aggregation()
    server: ServerStep = ServerStep()
    codec: Codec = Codec()
    evaluation: Evaluation = Evaluation()
    analytics: Analytics = Analytics()
    stop: Stop = Stop()
    transfer: Transfer = Transfer()
    trust: Trust = Trust()
    limits: Limits = Limits()
    simulation: Simulation = Simulation()


S = TypeVar("S", bound=msgspec.Struct)


def load(path: str | Path, overrides: Mapping[str, object] | None = None) -> Federation:
    """Read a federation file; ``overrides`` (``{"stop.rounds": 5}``) replace what it says, before it is checked.

    Relative paths in it are taken from the file's own folder and come back absolute.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown, missing, of the wrong type or out of range. The
            message names the file, the dotted key, what was found and what is allowed.
    """
    path = Path(path)
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a federation file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        table: Any = tree
        for section in sections:
            table = table.setdefault(section, {}) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table[name] = value
    try:
        check_keys(tree, Federation, "")
        federation = _resolve(msgspec.convert(tree, Federation), path.absolute().parent)
        check_together(federation)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error.__cause__
    return federation


def _resolve(federation: Federation, folder: Path) -> Federation:
    def absolute(spec: str) -> str:
        # "module:callable" names no file; a file whose name holds a colon still wins.
        if not spec or (":" in spec and not (folder / spec).exists()):
            return spec
        return str(folder / Path(spec).expanduser())

    def moved(section: S, *names: str) -> S:
        return msgspec.structs.replace(section, **{name: absolute(getattr(section, name)) for name in names})

    return msgspec.structs.replace(
        federation,
        federation=moved(federation.federation, "bundle", "state"),
        broker=moved(federation.broker, "password_file", "tls_ca", "tls_certificate", "tls_key"),
        trust=moved(federation.trust, "authority"),
        evaluation=moved(federation.evaluation, "data"),
        simulation=moved(federation.simulation, "data", "identities"),
    )

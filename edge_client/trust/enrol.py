"""How a device gets its certificate, and a new one before that expires: a state machine, and its driver over a link.

The device makes its key, stores it, and asks until it is told. Whatever is lost on the way is asked for again, with the
same key, and the federation answers the same. Only what the federation has signed is believed.
"""

import asyncio
import contextlib
import math
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_client.errors import ConfigError, FedgeError, TransportError, WireError
from edge_client.events import Connected, Disconnected, Log, Publish, Received, Subscribe, Tick
from edge_client.transport import Link, MqttLink
from edge_client.trust import identity as stored
from edge_client.trust.certificate import Certificate, make_request
from edge_client.trust.claim import Claim
from edge_client.trust.clock import believable
from edge_client.trust.identity import Identity
from edge_client.trust.keys import SigningKey, verify
from edge_client.wire import enrolment as wire

_SOON, _SLOW, _PENDING = 2.0, 30.0, 60.0
"""Seconds until an Ask is repeated that nobody answers, at first and at last; and one that a person decides on."""
_SILENCE = 3
"""Asks without an answer after which that is said."""
_RETRY = 3600.0
"""Seconds between looks whether the certificate has to be renewed, and between attempts."""
_PATIENCE = 300.0
"""Seconds in which a renewal is tried before it waits for the next look."""


@dataclass(frozen=True)
class Granted:
    """The federation has issued a certificate for the device's key; it was checked."""

    certificate: Certificate
    authority: Certificate
    pins: tuple[bytes, ...]
    issued: float


@dataclass(frozen=True)
class Refused:
    """The federation will not issue one."""

    reason: str


Event = Connected | Disconnected | Received | Tick
Action = Subscribe | Publish | Log | Granted | Refused


@dataclass
class Enrolment:
    """Asks for a certificate for ``key`` as ``client``, at the broker as ``user``.

    ``sign`` signs for the user: it is the claim's key, or where a certificate is renewed the device's. ``pins`` are the
    federation's keys. After `Granted` or `Refused` nothing happens any more.
    """

    federation: str
    user: str
    client: str
    key: SigningKey
    sign: Callable[[bytes], bytes]
    pins: tuple[bytes, ...]
    software: str = ""
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    rng: random.Random = field(default_factory=random.Random)
    wake: float | None = field(init=False, default=None)
    """When a Tick is due, None where none is."""
    _asked: int = field(init=False, default=0)
    """Asks on this connection that nobody has answered."""
    _pending: bool = field(init=False, default=False)
    _over: bool = field(init=False, default=False)
    _doubted: bool = field(init=False, default=False)
    _ask: bytes = field(init=False)

    def __post_init__(self) -> None:
        csr = make_request(self.key, self.client)
        ask = wire.Ask(self.client, csr, self.nonce, self.software)
        self._ask = wire.seal(self.federation, self.user, ask, self.sign)

    def handle(self, event: Event, now: float) -> Iterator[Action]:
        """What follows from an event; ``now`` is monotonic, in seconds."""
        if self._over:
            return
        match event:
            case Connected():
                self._asked = 0
                # Before it asks: the answer is not retained.
                yield Subscribe((wire.told_topic(self.federation, self.user),))
                yield from self._repeat(now)
            case Disconnected():
                self.wake = None
            case Tick():
                if self.wake is not None and now >= self.wake:
                    yield from self._repeat(now)
            case Received(topic, payload):
                if topic == wire.told_topic(self.federation, self.user):
                    yield from self._hear(payload, now)

    def _repeat(self, now: float) -> Iterator[Action]:
        if self._asked == _SILENCE:
            yield Log(
                f"nobody answers in federation {self.federation!r}; does `fedge serve` run, and has it the ca.key?"
            )
        self._asked += 1
        pause = _PENDING if self._pending else min(_SLOW, _SOON * 2.0 ** (self._asked - 1))
        self.wake = now + pause * self.rng.uniform(0.75, 1.25)
        yield Publish(wire.ask_topic(self.federation, self.user), self._ask)

    def _hear(self, payload: bytes, now: float) -> Iterator[Action]:
        try:
            told = self._believe(payload)
        except WireError as error:
            if not self._doubted:
                self._doubted = True
                yield Log(f"dropped an answer: {error} (further ones are dropped without a word)")
            return
        self._asked = 0
        if told.status == "pending":
            if not self._pending:
                yield Log(f"waiting for approval of {self.client} by {self.user}: {told.detail}")
            self._pending = True
            self.wake = now + _PENDING * self.rng.uniform(0.75, 1.25)
            return
        self._over, self.wake = True, None
        if told.status == "refused":
            yield Refused(told.detail)
            return
        try:
            yield self._check(told)
        except ConfigError as error:
            yield Refused(f"it has issued a certificate that cannot be used: {error}")

    def _believe(self, payload: bytes) -> wire.Told:
        told, covered, signature = wire.unseal(self.federation, self.user, payload, wire.Told)
        if not any(verify(pin, covered, signature) for pin in self.pins):
            raise WireError("the federation has not signed it")
        if told.nonce != self.nonce:
            raise WireError("it is the answer to another question")
        return told

    def _check(self, told: wire.Told) -> Granted:
        """What was issued, if it is what was asked for.

        Raises:
            ConfigError: it is not.
        """
        certificate = Certificate.parse(told.certificate)
        authority = Certificate.parse(told.authority, "authority")
        if certificate.public != self.key.public or certificate.name != self.client:
            raise ConfigError(f"certificate of {certificate.name!r} is for another key or name than was asked for")
        if certificate.federation != self.federation or not certificate.issued_by(authority):
            raise ConfigError("certificate was not issued by the authority that came with it")
        if not told.pins or certificate.expires <= told.issued:
            raise ConfigError("certificate comes without the federation's keys, or has no time to live")
        return Granted(certificate, authority, told.pins, told.issued)


class _Conversation:
    """Carries out what an enrolment decides, over a link."""

    def __init__(self, enrolment: Enrolment, link: Link, log: Callable[[str], None]) -> None:
        self._enrolment, self._link, self._log = enrolment, link, log
        self._timer: asyncio.TimerHandle | None = None
        self._result: asyncio.Future[Granted | Refused] = asyncio.get_running_loop().create_future()

    def connected(self) -> None:
        """The broker has accepted the connection."""
        self._feed(Connected())

    def disconnected(self, reason: str) -> None:
        """The connection is gone."""
        self._log(f"{reason}; trying again")
        self._feed(Disconnected())

    def message(self, topic: str, payload: bytes) -> None:
        """A message has arrived."""
        self._feed(Received(topic, payload))

    async def run(self, patience: float) -> Granted | Refused:
        """Converse until it is decided, or raise TimeoutError."""
        link = asyncio.ensure_future(self._link.run(self))
        try:
            async with asyncio.timeout(None if math.isinf(patience) else patience):
                await asyncio.wait((link, self._result), return_when=asyncio.FIRST_COMPLETED)
            if link.done():
                link.result()
            return await self._result
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await self._link.close()
            await asyncio.gather(link, return_exceptions=True)

    def _feed(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        try:
            for action in self._enrolment.handle(event, loop.time()):
                self._act(action)
        except Exception as error:
            # The caller is the link or a timer, which could do nothing about it.
            if not self._result.done():
                self._result.set_exception(error)
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._enrolment.wake is not None:
            self._timer = loop.call_at(self._enrolment.wake, self._feed, Tick())

    def _act(self, action: Action) -> None:
        match action:
            case Subscribe(topics):
                self._link.subscribe(topics)
            case Publish(topic, payload):
                self._link.publish(topic, payload)
            case Log(text):
                self._log(text)
            case Granted() | Refused():
                if not self._result.done():
                    self._result.set_result(action)


async def enroll(
    claim: Claim,
    client: str,
    folder: Path,
    log: Callable[[str], None],
    *,
    connect: Callable[[str], Link] | None = None,
    patience: float = math.inf,
) -> Identity:
    """Turn a claim into the identity of ``client``, in ``folder``; where it is there already, it is only looked at.

    ``connect`` makes a link of the name that it is given, where it shall not be one to the claim's broker. Broken off
    at any time, it can be started again, and goes on with the same key.

    Raises:
        ConfigError: the name cannot be a device's, the folder holds another identity, or the federation refuses.
        TransportError: the broker refuses, or nothing was decided within ``patience`` seconds.
    """
    if (problem := wire.check_name(client)) is not None:
        raise ConfigError(f"--id {client!r}: {problem}")
    if Identity.there(folder):
        held = Identity.load(folder)
        if (held.client, held.federation) != (client, claim.federation):
            raise ConfigError(
                f"{folder} is the identity of {held.client!r} in {held.federation!r} already; name another folder with "
                "--identity, or remove it"
            )
        if time.time() < held.expires:
            log(
                f"{client} is enrolled in {held.federation!r} already; the claim was not used (for another key, remove "
                f"{folder} first)"
            )
            return held
    if (doubt := believable(time.time(), 0.0)) is not None:
        log(doubt)
    key, own = stored.prepare(folder), claim.signing_key
    enrolment = Enrolment(claim.federation, claim.user, client, key, own.sign, claim.publics, software())
    name = f"fedge-{claim.federation}-{claim.user[1:]}"
    with claim.tls(folder) as tls:
        link = MqttLink(claim.address, name, tls=tls) if connect is None else connect(name)
        try:
            decided = await _Conversation(enrolment, link, log).run(patience)
        except TimeoutError:
            raise TransportError(
                f"{claim.user} has no certificate after {patience:.0f} s; start it again, it goes on where it was"
            ) from None
    return _keep(folder, decided, client, claim.federation)


async def renew(
    identity: Identity, log: Callable[[str], None], connect: Callable[[str], Link], *, patience: float = _PATIENCE
) -> Identity:
    """A new certificate for the same key, stored in the place of the old one.

    Raises:
        ConfigError: the federation refuses, or the identity cannot be read or stored.
        TransportError: the broker refuses, or nobody has answered within ``patience`` seconds.
    """
    key = identity.key
    enrolment = Enrolment(
        identity.federation, identity.client, identity.client, key, key.sign, identity.pins, software()
    )
    link = connect(f"fedge-{identity.federation}-{identity.client}-renewal")
    try:
        decided = await _Conversation(enrolment, link, log).run(patience)
    except TimeoutError:
        raise TransportError(f"nobody has answered within {patience:.0f} s") from None
    return _keep(identity.folder, decided, identity.client, identity.federation)


async def keep_renewed(
    identity: Identity,
    log: Callable[[str], None],
    connect: Callable[[str], Link],
    *,
    wall: Callable[[], float] = time.time,
    every: float = _RETRY,
) -> None:
    """Renew the certificate in the last third of its life, and again, until cancelled.

    It is looked at ``every`` so many seconds rather than once at the right time: clocks are set meanwhile.
    """
    while True:
        if identity.due(wall()):
            try:
                renewed = await renew(identity, log, connect)
            except FedgeError as error:
                log(f"{_ends(identity)} and could not be renewed yet: {error}")
            else:
                if renewed.serial != identity.serial:
                    log(f"{_ends(renewed)}: it was renewed")
                identity = renewed
        await asyncio.sleep(every)


@contextlib.asynccontextmanager
async def renewing(
    identity: Identity,
    log: Callable[[str], None],
    connect: Callable[[str], Link],
    *,
    wall: Callable[[], float] = time.time,
) -> AsyncIterator[None]:
    """Keep an identity's certificate renewed for as long as the context lasts."""
    for line in warnings(identity, wall()):
        log(line)
    task = asyncio.ensure_future(keep_renewed(identity, log, connect, wall=wall))
    try:
        yield
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended


def warnings(identity: Identity, now: float) -> Iterator[str]:
    """What is to be said of an identity and the clock at ``now``, seconds since 1970, before it is used."""
    doubt = believable(now, identity.issued)
    if doubt is not None:
        yield doubt
    elif now >= identity.expires:
        yield f"{_ends(identity)}, which is over: `fedge enroll` with a new claim, or set the clock if it is wrong"


def software() -> str:
    """What a device says that it runs."""
    with contextlib.suppress(PackageNotFoundError):
        return f"fedge {version('fedge')}"[:64]
    return "fedge"


def _keep(folder: Path, decided: Granted | Refused, client: str, federation: str) -> Identity:
    if isinstance(decided, Refused):
        raise ConfigError(f"federation {federation!r} refuses {client!r}: {decided.reason}")
    return stored.store(folder, decided.certificate, decided.authority, decided.pins, decided.issued)


def _ends(identity: Identity) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(identity.expires))
    return f"the certificate of {identity.client} holds until {day}"

"""Enrolment as part of a running server: a link of its own, on which devices ask, and a thread that answers them."""

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from broker_server.authority import CA_KEY, REGISTRY, Authority, telling_brokers
from broker_server.broker_config.reload import reload_all
from broker_server.quota import Quota
from broker_server.registrar import Answer, Registrar, Rule
from broker_server.registry import Registry
from edge_client.errors import ConfigError, FedgeError, WireError
from edge_client.transport import Link
from edge_client.wire import enrolment as wire

_WAITING = 64
"""Asks that may wait to be answered; what is beyond is dropped, and asked again."""
_PACE = 1.0
"""Seconds between two looks at the same Ask; a device waits longer."""
_USERS = 10_000
"""Asks that are remembered."""
_POLL = 1.0
"""Seconds between looks whether a person has approved something."""
_LINES = 20
"""Lines a minute that are logged; whoever reaches the broker can cause them."""


@dataclass
class Responder:
    """Answers devices on ``link``; ``make`` opens what decides, in the thread in which it then works."""

    federation: str
    link: Link
    make: Callable[[], Registrar]
    log: Callable[[str], None]
    wall: Callable[[], float] = time.time
    poll: float = _POLL
    pace: float = _PACE
    changed: Callable[[tuple[str, ...], tuple[str, ...]], Iterable[str]] = lambda valid, gone: ()
    """Told, in that thread, which devices are enrolled and which were, when that has changed; returns lines to log."""
    _queue: "asyncio.Queue[tuple[str, bytes]]" = field(init=False)
    _heard: "OrderedDict[bytes, float]" = field(init=False, default_factory=OrderedDict)
    _quota: Quota = field(init=False, default_factory=Quota)
    _pending: "OrderedDict[str, bytes]" = field(init=False, default_factory=OrderedDict)
    """The last Asks of users that wait for a person."""
    _issued: int = field(init=False, default=0)
    _revision: tuple[int, int] | None = field(init=False, default=None)
    _standing: tuple[tuple[str, ...], tuple[str, ...]] | None = field(init=False, default=None)
    _minute: int = field(init=False, default=-1)
    _logged: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._queue = asyncio.Queue(_WAITING)

    async def run(self) -> None:
        """Answer until cancelled.

        Raises:
            FedgeError: the authority, its registry or the broker cannot be used.
        """
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="enrolment") as pool:
            registrar = await loop.run_in_executor(pool, self.make)
            link = asyncio.ensure_future(self.link.run(self))
            work = asyncio.ensure_future(self._work(registrar, pool))
            try:
                await asyncio.wait((link, work), return_when=asyncio.FIRST_COMPLETED)
                for task in (link, work):
                    if task.done():
                        task.result()
            finally:
                await self.link.close()
                work.cancel()
                await asyncio.gather(link, work, return_exceptions=True)
                await loop.run_in_executor(pool, registrar.registry.close)

    def connected(self) -> None:
        """The broker has accepted the connection."""
        self.link.subscribe((wire.ask_topic(self.federation, "+"),))

    def disconnected(self, reason: str) -> None:
        """The connection is gone."""
        self.log(f"enrolment: {reason}; trying again")

    def message(self, topic: str, payload: bytes) -> None:
        """A message has arrived."""
        if len(payload) > wire.LIMIT:
            return
        now = asyncio.get_running_loop().time()
        try:
            user = wire.parse_ask(self.federation, topic)
        except WireError as error:
            if self._quota.takes(wire.CLAIMS, now):
                self._tell(f"enrolment: {error}")
            return
        if not self._quota.takes(user, now):
            return
        # Not by user: claims may write on one another's topics, and one that floods would keep others from being heard.
        mark = hashlib.sha256(topic.encode() + payload).digest()
        if now < self._heard.get(mark, -self.pace) + self.pace or self._queue.full():
            return
        self._queue.put_nowait((user, payload))
        self._heard[mark] = now
        self._heard.move_to_end(mark)
        if len(self._heard) > _USERS:
            self._heard.popitem(last=False)

    async def _work(self, registrar: Registrar, pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        looked = loop.time() - self.poll
        while True:
            with contextlib.suppress(TimeoutError):
                wait = max(0.0, looked + self.poll - loop.time())
                user, payload = await asyncio.wait_for(self._queue.get(), wait)
                self._say(user, payload, await loop.run_in_executor(pool, self._answer, registrar, user, payload))
            if loop.time() < looked + self.poll:
                continue
            looked = loop.time()
            answers, lines = await loop.run_in_executor(pool, self._look, registrar)
            for user, answer in answers:
                self._say(user, b"", answer)
            for line in lines:
                self._tell(f"enrolment: {line}")

    def _answer(self, registrar: Registrar, user: str, payload: bytes) -> Answer:
        try:
            answer = registrar.answer(user, payload, self.wall())
            self._issued += answer.issued
            return answer
        except FedgeError as error:
            # A full disk, say: the device asks again.
            return Answer(None, (f"enrolment: {user} gets no answer: {error}",))

    def _look(self, registrar: Registrar) -> tuple[list[tuple[str, Answer]], list[str]]:
        """What has come of commands and answers since the last look: answers for those who waited, and lines."""
        try:
            revision = registrar.registry.revision(), self._issued
            if revision == self._revision:
                return [], []
            answers = self._decided(registrar)
            standing = registrar.registry.standing(self.wall())
            lines = [] if standing == self._standing else list(self.changed(*standing))
            if self._standing is None:
                # A broker that was started before this server has all of it already.
                lines = []
        except FedgeError as error:
            return [], [str(error)]
        self._revision, self._standing = revision, standing
        return answers, lines

    def _decided(self, registrar: Registrar) -> list[tuple[str, Answer]]:
        """Answers for those who wait no more."""
        waiting = {claim.user for claim in registrar.registry.claims("pending")}
        ready = [(user, payload) for user, payload in self._pending.items() if user not in waiting]
        return [(user, self._answer(registrar, user, payload)) for user, payload in ready]

    def _say(self, user: str, payload: bytes, answer: Answer) -> None:
        if answer.pending:
            self._pending[user] = payload or self._pending[user]
            if len(self._pending) > _USERS:
                self._pending.popitem(last=False)
        else:
            self._pending.pop(user, None)
        if answer.told is not None:
            self.link.publish(wire.told_topic(self.federation, user), answer.told)
        # Only who has a claim causes these, and once; a flood of others must not hide them.
        say = self.log if answer.issued or answer.pending else self._tell
        for line in answer.lines:
            say(line)

    def _tell(self, line: str) -> None:
        minute = int(asyncio.get_running_loop().time() // 60)
        if minute != self._minute:
            self._minute, self._logged = minute, 0
        self._logged += 1
        if self._logged <= _LINES:
            self.log(line)
        elif self._logged == _LINES + 1:
            self.log("enrolment: more happens than is logged; silent for the rest of this minute")


@contextlib.asynccontextmanager
async def responding(
    folder: Path,
    federation: str,
    connect: Callable[[str], Link],
    log: Callable[[str], None],
    *,
    rule: Rule = "claim",
    days: float = 365.0,
) -> AsyncIterator[None]:
    """Enrol devices for as long as the context lasts, where the authority in ``folder`` has its key.

    ``connect`` makes a link of the name that it is given, as the user for enrolment.

    Raises:
        ConfigError: the authority is another federation's, or cannot be used.
    """
    authority = Authority.load(folder)
    if authority.federation != federation:
        raise ConfigError(
            f"{folder} is the authority of {authority.federation!r}; expected that of {federation!r}: name it in "
            "trust.authority, or make one with `fedge ca init`"
        )
    if authority.key is None:
        log(f"enrolment: {folder / CA_KEY} is not there, so no device can enrol or renew its certificate")
        yield
        return
    link = connect(f"fedge-{federation}-enrol")

    def tell_brokers(valid: tuple[str, ...], gone: tuple[str, ...]) -> list[str]:
        with telling_brokers(folder):
            return reload_all(folder, devices=valid, revoked=gone)

    responder = Responder(
        federation,
        link,
        lambda: Registrar(authority, Registry.open(folder / REGISTRY), rule, days),
        log,
        changed=tell_brokers,
    )
    life = asyncio.ensure_future(responder.run())
    life.add_done_callback(lambda ended: _say_why(ended, log))
    try:
        yield
    finally:
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)


def _say_why(ended: "asyncio.Future[None]", log: Callable[[str], None]) -> None:
    """Rounds go on without enrolment; but not without a word."""
    if not ended.cancelled() and (error := ended.exception()) is not None:
        log(f"enrolment has ended, devices cannot enrol until the server is started anew: {error!r}")

"""Who gets a certificate: what is decided about a device's Ask, given what the registry says.

What follows from an Ask depends on the claim, the names and the keys alone, never on how often it was said before: an
Ask whose answer was lost gets the same certificate again, and a claim is one device's for good.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from broker_server.authority import Authority
from broker_server.registry import ClaimRow, DeviceRow, Registry
from edge_client.errors import ConfigError, WireError
from edge_client.trust.certificate import read_request
from edge_client.trust.claim import is_claim
from edge_client.trust.clock import believable
from edge_client.trust.identity import due
from edge_client.trust.keys import verify
from edge_client.wire import enrolment as wire

Rule = Literal["claim", "ask"] | Sequence[str]
"""Who is approved without a person: whoever has a claim, nobody, or names that fit one of these patterns."""


@dataclass(frozen=True)
class Ignore:
    """Nothing is said: whoever asks has not shown that it is he."""

    reason: str


@dataclass(frozen=True)
class Refuse:
    """No certificate."""

    reason: str


@dataclass(frozen=True)
class Wait:
    """Somebody has to approve it first."""


@dataclass(frozen=True)
class Again:
    """The certificate that the device has been given before."""

    device: DeviceRow


@dataclass(frozen=True)
class Issue:
    """A new certificate."""


Verdict = Ignore | Refuse | Wait | Again | Issue


class Standing(NamedTuple):
    """What the registry says of an Ask: of the claim, of who has the name, and of whose the key is or was last.

    ``barred`` is until when something revoked carries the name, in seconds since 1970.
    """

    claim: ClaimRow | None
    named: DeviceRow | None
    owner: DeviceRow | None
    barred: float | None = None


def judge(
    user: str,
    client: str,
    public: bytes,
    signed: Callable[[bytes], bool],
    standing: Standing,
    rule: Rule,
    now: float,
) -> Verdict:
    """What becomes of an Ask for a certificate of ``client``'s key ``public`` at ``now``, seconds since 1970.

    ``signed`` tells whether the Ask is signed with a key: only then is ``user`` who he says he is.
    """
    if not is_claim(user):
        return _renewal(user, client, public, signed, standing.named, now)
    claim = standing.claim
    if claim is None:
        return Refuse(f"{user} is no claim of this federation")
    if not signed(claim.public):
        return Ignore("it is not signed with the claim's key")
    if claim.state == "refused":
        return Refuse(claim.detail or "the request was refused")
    if claim.device not in (None, public):
        return Refuse("the claim was used already, with another key; each device needs one of its own")
    if claim.client not in (None, client):
        return Refuse(f"the claim was used already, for {claim.client!r}")
    if claim.state == "open" and now >= claim.expires:
        return Refuse("the claim has expired; make another one with `fedge claim`")
    if (problem := _taken(client, public, standing, now)) is not None:
        return Refuse(problem)
    if claim.state == "issued":
        named = standing.named
        if named is None or named.public != public or not named.valid(now):
            return Refuse("the certificate that was issued with this claim has expired")
        return Again(named)
    if claim.state == "approved" or rule == "claim":
        return Issue()
    if not isinstance(rule, str) and any(fnmatchcase(client, pattern) for pattern in rule):
        return Issue()
    return Wait()


def _taken(client: str, public: bytes, standing: Standing, now: float) -> str | None:
    named, owner = standing.named, standing.owner
    if owner is not None and owner.revoked is not None:
        return f"this key was revoked as {owner.client!r}; remove it from the device and enrol with another --id"
    if owner is not None and owner.client != client:
        return f"this key belongs to {owner.client!r}; each device needs one of its own"
    if named is not None and named.valid(now) and named.public != public:
        return f"{client!r} is another device; take another --id"
    if standing.barred is not None:
        until = time.strftime("%Y-%m-%d", time.gmtime(standing.barred))
        return f"{client!r} was revoked, and what was revoked expires on {until}; take another --id, or wait until then"
    return None


def _renewal(
    user: str,
    client: str,
    public: bytes,
    signed: Callable[[bytes], bool],
    device: DeviceRow | None,
    now: float,
) -> Verdict:
    if user != client:
        return Ignore(f"it asks for the name {client!r}")
    if device is None:
        return Refuse(f"{client!r} is not enrolled in this federation")
    if not signed(device.public):
        return Ignore("it is not signed with the device's key")
    if device.revoked is not None:
        return Refuse(f"{client!r} is revoked")
    if public != device.public:
        return Refuse("a certificate is renewed for the same key; a new key needs a claim")
    if now >= device.expires:
        return Refuse("the certificate has expired; the device needs a new claim")
    return Issue() if due(device.issued, device.expires, now) else Again(device)


class Answer(NamedTuple):
    """What is said on the user's topic, if anything; lines for the log; and what has come of it."""

    told: bytes | None
    lines: tuple[str, ...] = ()
    pending: bool = False
    issued: bool = False


@dataclass
class Registrar:
    """Answers Asks from an authority and its registry. A certificate is in the registry before it is told of."""

    authority: Authority
    registry: Registry
    rule: Rule = "claim"
    days: float = 365.0

    def answer(self, user: str, payload: bytes, now: float) -> Answer:
        """Answer an Ask that came on the topic of ``user`` at ``now``, seconds since 1970.

        Raises:
            LedgerError: the registry cannot be read or written.
            ConfigError: the authority's key is not there.
        """
        federation = self.authority.federation
        try:
            ask, covered, signature = wire.unseal(federation, user, payload, wire.Ask)
        except WireError as error:
            return Answer(None, (f"enrolment: dropped a message of {user}: {error}",))
        if (doubt := believable(now, 0.0)) is not None:
            return Answer(None, (f"enrolment: {user} waits: {doubt}",))

        def signed(key: bytes) -> bool:
            return verify(key, covered, signature)

        verdict = self._judge(user, ask, signed, now)
        if not isinstance(verdict, Issue | Wait):
            return self._carry_out(user, ask, verdict, now)
        # Nobody else writes from here on. Who is refused comes not so far: a flood must not hold up `fedge revoke`.
        with self.registry.group():
            return self._carry_out(user, ask, self._judge(user, ask, signed, now), now)

    def _judge(self, user: str, ask: wire.Ask, signed: Callable[[bytes], bool], now: float) -> Verdict:
        claim, named = self.registry.claim(user), self.registry.device(ask.client)
        try:
            public = read_request(ask.csr, ask.client)
        except ConfigError as error:
            # Said to him only who has shown who he is; anybody can send nonsense in another's name.
            known = claim or (named if named is not None and named.client == user else None)
            return Refuse(str(error)) if known is not None and signed(known.public) else Ignore(str(error))
        if (problem := self.authority.unfit(ask.client)) is not None:
            return Refuse(f"{ask.client!r}: {problem}") if claim and signed(claim.public) else Ignore(problem)
        standing = Standing(claim, named, self.registry.owner(public), self.registry.barred(ask.client, now))
        return judge(user, ask.client, public, signed, standing, self.rule, now)

    def _carry_out(self, user: str, ask: wire.Ask, verdict: Verdict, now: float) -> Answer:
        match verdict:
            case Ignore(reason):
                return Answer(None, (f"enrolment: ignored a request of {user}: {reason}",))
            case Refuse(reason):
                line = f"enrolment: refused {ask.client!r} by {user}: {reason}"
                return Answer(self._tell(user, wire.Told(ask.nonce, "refused", reason[:500])), (line,))
            case Wait():
                return self._wait(user, ask, now)
            case Again(device):
                return Answer(self._tell(user, self._issued(ask, device)))
            case Issue():
                return self._issue(user, ask, now)

    def _wait(self, user: str, ask: wire.Ask, now: float) -> Answer:
        claim = self.registry.claim(user)
        lines: tuple[str, ...] = ()
        if claim is not None and claim.state == "open":
            self.registry.bind(user, ask.client, read_request(ask.csr, ask.client), "pending", now)
            lines = (f"enrolment: {ask.client!r} waits for approval: fedge approve {ask.client}",)
        told = wire.Told(ask.nonce, "pending", "the operator has to say: fedge approve")
        return Answer(self._tell(user, told), lines, pending=True)

    def _issue(self, user: str, ask: wire.Ask, now: float) -> Answer:
        certificate = self.authority.issue(ask.csr, ask.client, self.days, now=now)
        device = DeviceRow(
            certificate.serial, ask.client, certificate.public, certificate.der, now, certificate.expires, None
        )
        self.registry.certify(device)
        if is_claim(user):
            self.registry.bind(user, ask.client, certificate.public, "issued", now)
        what = f"enrolled by {user}" if is_claim(user) else "has a renewed certificate"
        line = f"enrolment: {ask.client!r} {what}{f', {ask.software}' if ask.software else ''}"
        return Answer(self._tell(user, self._issued(ask, device)), (line,), issued=True)

    def _issued(self, ask: wire.Ask, device: DeviceRow) -> wire.Told:
        authority = self.authority
        return wire.Told(ask.nonce, "issued", "", device.der, authority.certificate.der, authority.pins, device.issued)

    def _tell(self, user: str, told: wire.Told) -> bytes:
        return wire.seal(self.authority.federation, user, told, self.authority.signing.sign)

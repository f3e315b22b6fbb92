"""A federation that enrols devices, without sockets: an authority, its registry, and devices that ask by hand."""

import functools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from broker_server.authority import REGISTRY, Authority
from broker_server.registrar import Answer, Registrar, Rule
from broker_server.registry import Registry
from edge_client.trust.certificate import Certificate, make_request
from edge_client.trust.claim import Claim
from edge_client.trust.keys import SigningKey, verify
from edge_client.wire import enrolment as wire

NOW = 1_800_000_000.0
"""In January 2027, by the server's clock."""
DAY = 86_400.0
WEEK = 7 * DAY
URL = "mqtt://127.0.0.1:1"
NONCE = bytes(range(16))


@functools.cache
def _made(number: int) -> "tempfile.TemporaryDirectory[str]":
    """An authority; each is made once, because its files are written with great care."""
    place = tempfile.TemporaryDirectory()
    Authority.init(Path(place.name) / "authority", "toys", ["broker.example"], now=NOW)
    return place


class Office:
    """An authority that approves by ``rule``, and the commands of its operator; another one with another ``number``."""

    def __init__(self, folder: Path, rule: Rule = "claim", number: int = 0) -> None:
        self.folder = folder
        shutil.copytree(Path(_made(number).name) / "authority", folder, dirs_exist_ok=True)
        self.authority = Authority.load(folder)
        self.registry = Registry.open(folder / REGISTRY)
        self.registrar = Registrar(self.authority, self.registry, rule, 30.0)

    def claims(self, count: int = 1, seconds: float = WEEK) -> list[Claim]:
        """Claims, registered."""
        made = self.authority.claims(count, seconds, URL, now=NOW)
        self.registry.add_claims(((one.user, cert.public, cert.serial, one.expires) for one, cert in made), NOW)
        return [one for one, _ in made]

    def claim(self) -> Claim:
        """One of them."""
        return self.claims()[0]

    def told(self, user: str, answer: Answer) -> wire.Told:
        """What an answer says to a device, which believes the federation's signature alone."""
        assert answer.told is not None, answer.lines
        told, covered, signature = wire.unseal(self.authority.federation, user, answer.told, wire.Told)
        assert verify(self.authority.signing.public, covered, signature)
        return told


@dataclass
class Device:
    """A device with a key, asking ``office``."""

    office: Office
    client: str
    key: SigningKey = field(default_factory=SigningKey.generate)

    def payload(self, user: str, sign: SigningKey, *, nonce: bytes = NONCE, csr: bytes | None = None) -> bytes:
        """An Ask as it travels."""
        ask = wire.Ask(self.client, csr or make_request(self.key, self.client), nonce, "fedge 1")
        return wire.seal(self.office.authority.federation, user, ask, sign.sign)

    def ask(self, claim: Claim, now: float = NOW) -> wire.Told:
        """Ask with a claim; what it is told."""
        answer = self.office.registrar.answer(claim.user, self.payload(claim.user, claim.signing_key), now)
        return self.office.told(claim.user, answer)

    def renew(self, now: float) -> wire.Told:
        """Ask for a new certificate with the device's own key."""
        answer = self.office.registrar.answer(self.client, self.payload(self.client, self.key), now)
        return self.office.told(self.client, answer)


def issued(told: wire.Told) -> Certificate:
    """The certificate that was issued."""
    assert told.status == "issued", told.detail
    return Certificate.parse(told.certificate)

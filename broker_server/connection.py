"""The server's connection to its broker: which one, how it is trusted, and who the server is there."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from broker_server.broker import EmbeddedBroker
from broker_server.broker_config.spec import BrokerSpec
from broker_server.config import Federation
from broker_server.hush import Hush
from edge_client.address import Address
from edge_client.errors import ConfigError
from edge_client.tls import Tls
from edge_client.transport import MqttLink
from edge_client.wire.topics import Topics

if TYPE_CHECKING:
    from broker_server.keyring import Keyring


_SWEEP = 15.0
"""Seconds between looks for what devices have retained while the server listens."""


class Connection(NamedTuple):
    """Where the broker is, and, for ``mqtts://``, who is trusted there and who one is."""

    address: Address
    tls: Tls | None


@contextlib.contextmanager
def broker(settings: Federation, log: Callable[[str], None], *, insecure: bool = False) -> Iterator[Connection]:
    """The broker that the settings name, or an embedded one for as long as the context lasts.

    With ``trust.authority`` the embedded one asks for certificates, and the server has one; else it is on loopback.

    Raises:
        ConfigError: a setting cannot be used, or the broker is elsewhere and without TLS, and this not ``insecure``.
        TransportError: it cannot be started.
    """
    wanted, tls = settings.broker, _tls(settings)
    if not wanted.url:
        folder, spec = Path(settings.federation.state) / "broker", None
        if settings.trust.authority:
            spec = _spec(settings.federation.name, Path(settings.trust.authority))
        with EmbeddedBroker.start(folder, kind=wanted.kind, host=wanted.host, port=wanted.port, spec=spec) as embedded:
            log(f"broker: {embedded.kind} on {embedded.url}")
            yield Connection(Address.parse(embedded.url), tls)
        return
    address = Address.parse(wanted.url)
    address.check(insecure=insecure)
    if wanted.username:
        address = dataclasses.replace(address, username=wanted.username, password=_password(wanted.password_file))
    log(f"broker: {address}")
    yield Connection(address, tls)


@contextlib.contextmanager
def keys(settings: Federation) -> "Iterator[Keyring | None]":
    """What the server signs with and whom it believes; None where the federation does not sign.

    Raises:
        ConfigError, LedgerError: the folder ``trust.authority`` cannot be used.
    """
    if not settings.trust.authority:
        yield None
        return
    # A federation that does not sign does not load what signs.
    from broker_server.keyring import authority_keyring

    with authority_keyring(Path(settings.trust.authority), settings.federation.name) as keyring:
        yield keyring


def hush(settings: Federation, log: Callable[[str], None]) -> Hush | None:
    """What tells the federation's brokers who is muted; None where it has not configured them."""
    if not settings.trust.authority:
        return None
    # A federation that does not sign does not load its library.
    from broker_server.authority import telling_brokers
    from broker_server.broker_config.reload import mute

    folder = Path(settings.trust.authority)

    def tell(muted: tuple[str, ...]) -> None:
        with telling_brokers(folder):
            mute(folder, muted)

    return Hush(tell, log)


def server_link(settings: Federation, address: Address, *, attempts: int = 0, tls: Tls | None = None) -> MqttLink:
    """The server's own connection to its broker."""
    name = settings.federation.name
    # A device may retain what it says, and every server to come would hear it.
    clears = Topics(name).every_up.removesuffix("#")
    # What is retained while the server listens shows when it subscribes anew. A NATS cluster that has lost a node hangs
    # on that (2.9.10), so it is done where the broker is the server's own.
    sweep = math.inf if settings.broker.url else _SWEEP
    return MqttLink(address, f"fedge-{name}-server", attempts=attempts, clears=clears, sweep=sweep, tls=tls)


def _spec(federation: str, authority: Path) -> BrokerSpec:
    """What an embedded broker needs to know of a federation; also who was revoked, be it on the list or not."""
    # A federation that does not sign does not load what certifies.
    from broker_server.authority import REGISTRY
    from broker_server.registry import standing

    enrolled, revoked = standing(authority / REGISTRY, time.time())
    return BrokerSpec(federation, authority, devices=enrolled, revoked=revoked)


def _tls(settings: Federation) -> Tls | None:
    wanted, authority = settings.broker, settings.trust.authority
    if bool(wanted.tls_certificate) != bool(wanted.tls_key):
        raise ConfigError("broker.tls_certificate and broker.tls_key belong together; set both or none")
    if wanted.tls_ca and not wanted.url.startswith("mqtts://"):
        raise ConfigError(f"broker.tls_ca is set and broker.url is {wanted.url!r}; expected one with mqtts://")
    found = Tls.of(Path(authority), "server") if authority else Tls()
    if wanted.tls_ca:
        found = dataclasses.replace(found, ca=Path(wanted.tls_ca))
    if wanted.tls_certificate:
        found = dataclasses.replace(found, certificate=Path(wanted.tls_certificate), key=Path(wanted.tls_key))
    return None if found == Tls() else found


def _password(path: str) -> str | None:
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"broker.password_file {path}: {error}; expected a file with the password") from error

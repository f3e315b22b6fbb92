"""Two brokers with the same limits for a bench federation: in the open, and with a certificate for everybody."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from federations import ROOT, Sections

sys.path.insert(0, str(ROOT))

from broker_server.broker import EmbeddedBroker
from broker_server.broker_config.spec import BrokerSpec
from tests.certificates import Certificates


@contextmanager
def mosquitto(folder: Path, federation: str, clients: int, *, tls: bool) -> Iterator[Sections]:
    """Run one; gives the sections of a federation file with which server and emulated phones reach it."""
    shutil.rmtree(folder, ignore_errors=True)
    if not tls:
        with EmbeddedBroker.start(folder, kind="mosquitto") as broker:
            yield {"broker": {"url": broker.url}}
        return
    authority, phones = Certificates(folder / "authority"), folder / "phones"
    phones.mkdir()
    for number in range(clients):
        name = f"phone-{number:04d}"
        authority.device(name).rename(phones / name)
    spec = BrokerSpec(federation, authority.folder)
    with EmbeddedBroker.start(folder / "broker", kind="mosquitto", spec=spec) as broker:
        own = {"ca": "ca.crt", "certificate": "server.crt", "key": "server.key"}
        named = {f"tls_{key}": str(authority.folder / name) for key, name in own.items()}
        yield {"broker": {"url": broker.url, **named}, "simulation": {"identities": str(phones)}}

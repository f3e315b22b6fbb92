"""Brokers with the same limits for a bench federation: in the open, with certificates for everybody, and signed too."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from federations import ROOT, Sections

sys.path.insert(0, str(ROOT))

from broker_server.authority import Authority
from broker_server.broker import EmbeddedBroker
from broker_server.broker_config.spec import BrokerSpec
from tests.certificates import Certificates
from tests.federation import enrolled

Way = Literal["tcp", "tls", "signed"]
"""In the open; by TLS; by TLS, with messages that both sides sign, and believe only then (`trust.authority`)."""


@contextmanager
def mosquitto(folder: Path, federation: str, clients: int, way: Way) -> Iterator[Sections]:
    """Run one; gives the sections of a federation file with which server and emulated phones reach it."""
    shutil.rmtree(folder, ignore_errors=True)
    if way == "tcp":
        with EmbeddedBroker.start(folder, kind="mosquitto") as broker:
            yield {"broker": {"url": broker.url}}
        return
    phones = folder / "phones"
    phones.mkdir(parents=True)
    names = [f"phone-{number:04d}" for number in range(clients)]
    sections: dict[str, dict[str, object]] = {"simulation": {"identities": str(phones)}}
    if way == "tls":
        certificates = Certificates(folder / "authority")
        for name in names:
            certificates.device(name).rename(phones / name)
        authority, own = certificates.folder, {"ca": "ca.crt", "certificate": "server.crt", "key": "server.key"}
        sections["broker"] = {f"tls_{key}": str(authority / name) for key, name in own.items()}
    else:
        office = Authority.init(folder / "authority", federation, ["localhost"], now=time.time())
        for name in names:
            enrolled(office, phones / name, name, time.time())
        authority = office.folder
        sections |= {"broker": {}, "trust": {"authority": str(authority)}}
    with EmbeddedBroker.start(folder / "broker", kind="mosquitto", spec=BrokerSpec(federation, authority)) as broker:
        yield sections | {"broker": {"url": broker.url, **sections["broker"]}}

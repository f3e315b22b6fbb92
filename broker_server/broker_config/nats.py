"""NATS as an MQTT broker (nats-server 2.9 or later): certificates as users, and a rule for each.

NATS knows no rule with a user's name in it, nor revocation lists: whoever may connect is named in ``users.conf``. A
device that is not enrolled yet may be named, for nobody has its certificate. When the file has changed, NATS has to be
started anew: read again (SIGHUP), 2.9.10 delivers nothing any more on subscriptions of quality of service 1 that stand,
and answers as if it did. Clients come back by themselves, and retained messages are on its disk.
Topics are NATS's subjects with other separators; a wildcard's own root is a subject of its own (``a/#`` is ``a`` and
``a.>``), and what MQTT needs besides, for subscriptions of quality of service 1, is ``$MQTT.sub.>``, which no MQTT
client can subscribe to by itself.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from broker_server.broker_config.spec import CLAIM, ENROLMENT, SERVER, BrokerSpec, fill, remember

CLIENT_PORT = 4222
_MEMORY, _FILES = 256 * 2**20, 8 * 2**30
"""Bytes that JetStream may hold in memory and on the disk: without a limit it takes most of both."""


def subjects(topics: Iterable[str]) -> Iterator[str]:
    """NATS's subjects for MQTT's topic filters."""
    for topic in topics:
        # A dot within a level is written as two slashes (2.10; before that such topics are refused).
        levels = [level.replace(".", "//") for level in topic.split("/")]
        if levels[-1] == "#":
            yield ".".join(levels[:-1]).replace("+", "*")
            levels[-1] = ">"
        yield ".".join(levels).replace("+", "*")


def rules(spec: BrokerSpec) -> str:
    """The file of users, each with what it may write and read."""
    topics = spec.topics
    asks, tells = f"{topics}/enrol/+/ask", f"{topics}/enrol/+/told"
    users = [
        _user(SERVER, [f"{topics}/#"], [f"{topics}/#"]),
        _user(ENROLMENT, [tells], [asks]),
        _user(CLAIM, [asks], [tells]),
    ]
    for name in sorted({*spec.devices, *spec.expected} - set(spec.revoked)):
        writes = [f"{topics}/up/{name}/#", f"{topics}/enrol/{name}/ask"]
        reads = [f"{topics}/down/{name}/#", f"{topics}/pub/#", f"{topics}/enrol/{name}/told"]
        users.append(_user(name, writes, reads))
    return "# Who may connect, and what they write and read.\nusers: [\n" + "".join(users) + "]\n"


def configuration(spec: BrokerSpec, place: Path, client_port: int) -> str:
    """The configuration file of a broker whose folder lies at ``place``."""

    def at(name: str) -> str:
        return json.dumps(str(place / name))

    host = f"[{spec.host}]" if ":" in spec.host else spec.host
    tls = f"cert_file: {at('broker.crt')}, key_file: {at('broker.key')}, ca_file: {at('ca.crt')}, verify_and_map: true"
    return f"""\
# nats-server for federation {spec.federation}, written by `fedge broker config`. Start it with
#   nats-server -c {place}/nats.conf
server_name: fedge
pid_file: {at("store/nats.pid")}
# NATS's own protocol: on this machine only, with a certificate, and for none of these users.
listen: "127.0.0.1:{client_port}"
tls {{ {tls} }}
max_payload: {spec.packet_limit}
# What MQTT retains and queues; devices can fill that, and no more.
jetstream {{ store_dir: {at("store")}, max_memory_store: {_MEMORY}, max_file_store: {_FILES} }}
authorization {{ include "users.conf" }}
mqtt {{
  listen: "{host}:{spec.port}"
  tls {{ {tls}, timeout: 10 }}
}}
"""


def write(folder: Path, spec: BrokerSpec, client_port: int = CLIENT_PORT) -> Path:
    """Write a folder from which nats-server can be started; the path of its configuration file.

    ``client_port`` is that of NATS's own protocol, which cannot be switched off.

    Raises:
        ConfigError: a file of the authority is missing, or the disk refuses.
    """
    texts = {"nats.conf": configuration(spec, spec.at(folder), client_port), "users.conf": rules(spec)}
    fill(folder, spec, texts, ("store",))
    remember(folder, "nats", spec, client_port=client_port)
    return folder / "nats.conf"


def _user(name: str, writes: list[str], reads: list[str]) -> str:
    publish = json.dumps(list(subjects(writes)))
    subscribe = json.dumps([*subjects(reads), "$MQTT.sub.>"])
    return (
        f'  {{ user: "CN={name}", allowed_connection_types: ["MQTT"],\n'
        f"    permissions: {{ publish: {publish}, subscribe: {subscribe} }} }}\n"
    )

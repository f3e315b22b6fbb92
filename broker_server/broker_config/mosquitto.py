"""mosquitto's configuration, for 2.0 and for 2.1, which took access rules out into plugins (mosquitto.conf(5)).

The rules are the same file for both. A rule that denies is tried before one that grants, and a user's own before the
patterns that hold for everybody: so users that are no devices get no more than what is written for them.
"""

import re
import subprocess
from pathlib import Path
from typing import Literal

from broker_server.broker_config.programs import find
from broker_server.broker_config.spec import CLAIM, ENROLMENT, SERVER, BrokerSpec, fill, remember
from edge_client.errors import ConfigError

Dialect = Literal["2.0", "2.1"]
_QUEUED, _MEMORY = 256 * 2**20, 2 * 2**30
"""Bytes that wait for one slow subscriber, and of all that the broker holds, at most."""
_PLUGIN = "mosquitto_acl_file.so"
_LIBRARIES = ("/usr/lib/*-linux-gnu", "/usr/lib", "/usr/local/lib", "/opt/homebrew/lib")


def limits(packet: int, queue: int) -> str:
    """Lines for limits: on what one message may cost, and none that loses messages.

    The queue is long because a full one drops messages and acknowledges them all the same (2.0.11: 1,020 of 2,000
    retained chunks arrived with the default of 1,000). It ends at 256 MiB all the same, and the broker at 2 GiB: what
    devices send to a server that is slow, or retain until it clears that, would fill any memory. Bundles and versions
    that are retained count, so a machine for very large ones wants more (``memory_limit``). A packet that is too large
    ends the connection before memory is set aside for it; ``message_size_limit`` would read it whole, and drop it.
    Sessions are clean: one that stays would only let messages pile up for it. What must survive a restart is in the
    server's ledger, and is retained again.
    """
    return f"""\
max_packet_size {packet}
max_queued_messages {queue}
max_queued_bytes {_QUEUED}
memory_limit {_MEMORY}
max_inflight_messages 1000
persistent_client_expiration 1h
persistence false
set_tcp_nodelay true
sys_interval 0
"""


def rules(spec: BrokerSpec) -> str:
    """The access rules."""
    topics = spec.topics
    nothing = "\n".join(f"topic deny {topics}/{part}/#" for part in ("up", "down", "pub"))
    revoked = "".join(f"\nuser {name}\ntopic deny #\n" for name in sorted(spec.revoked))
    quiet = sorted(set(spec.muted) - set(spec.revoked))
    muted = "".join(f"\nuser {name}\ntopic deny {topics}/up/{name}/#\n" for name in quiet)
    return f"""\
# Who reads and writes what. A user is the name in a certificate; a device's is its --id.
user {SERVER}
topic readwrite {topics}/#

user {ENROLMENT}
topic read {topics}/enrol/+/ask
topic write {topics}/enrol/+/told
{nothing}

user {CLAIM}
topic write {topics}/enrol/+/ask
topic read {topics}/enrol/+/told
{nothing}
{revoked}{muted}
pattern write {topics}/up/%u/#
pattern read {topics}/down/%u/#
pattern read {topics}/pub/#
pattern write {topics}/enrol/%u/ask
pattern read {topics}/enrol/%u/told
"""


def configuration(spec: BrokerSpec, place: Path, dialect: Dialect, plugin: str = "") -> str:
    """The configuration file of a broker whose folder lies at ``place``."""
    listener = f"""\
listener {spec.port} {spec.host}
cafile {place}/ca.crt
certfile {place}/broker.crt
keyfile {place}/broker.key
crlfile {place}/crl.pem
require_certificate true
use_identity_as_username true
tls_version tlsv1.2
"""
    if dialect == "2.0":
        access = f"{listener}allow_anonymous false\nacl_file {place}/acl\n"
    else:
        access = f"""\
plugin_load acl {plugin or _plugin()}
plugin_opt_acl_file {place}/acl

{listener}listener_allow_anonymous false
plugin_use acl
"""
    return f"""\
# mosquitto {dialect} for federation {spec.federation}, written by `fedge broker config`. Start it with
#   mosquitto -c {place}/mosquitto.conf
# Started by root it becomes this user, who must be able to read the files here.
user {spec.owner}
pid_file {place}/mosquitto.pid
{limits(spec.packet_limit, spec.queue)}
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
connection_messages false

{access}"""


def write(folder: Path, spec: BrokerSpec, dialect: Dialect | None = None, plugin: str = "") -> Path:
    """Write a folder from which mosquitto can be started; the path of its configuration file.

    Args:
        folder: made where it is missing.
        spec: what for.
        dialect: for which version; None is the one that is installed here.
        plugin: 2.1's ``mosquitto_acl_file.so``; empty is where it is usually found.

    Raises:
        ConfigError: a file of the authority is missing, or the disk refuses.
    """
    spoken = dialect or installed_dialect()
    texts = {"mosquitto.conf": configuration(spec, spec.at(folder), spoken, plugin), "acl": rules(spec)}
    fill(folder, spec, texts)
    remember(folder, "mosquitto", spec, dialect=spoken, plugin=plugin)
    return folder / "mosquitto.conf"


def installed_dialect() -> Dialect:
    """The dialect of the mosquitto that is installed here; 2.0, which 2.1 still reads, where there is none.

    Raises:
        ConfigError: it is older than 2.0.
    """
    program = find("mosquitto")
    if program is None:
        return "2.0"
    said = subprocess.run([program, "-h"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    found = re.search(r"version (\d+)\.(\d+)", said)
    version = (2, 0) if found is None else (int(found[1]), int(found[2]))
    if version < (2, 0):
        raise ConfigError(f"{program} is version {version[0]}.{version[1]}; expected 2.0 or later, or say --dialect")
    return "2.1" if version >= (2, 1) else "2.0"


def _plugin() -> str:
    found = (path for place in _LIBRARIES for path in Path("/").glob(f"{place[1:]}/{_PLUGIN}"))
    return str(next(found, Path("/usr/lib") / _PLUGIN))

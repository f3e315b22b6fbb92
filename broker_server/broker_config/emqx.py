"""EMQX 5's configuration (docs.emqx.com: MQTT over TLS, ACL file), written to its documentation.

EMQX looks revocation lists up at an address in the certificate, which ours have not got: a revoked device is denied
everything by a rule of its own instead.
"""

from pathlib import Path

from broker_server.broker_config.spec import CLAIM, ENROLMENT, SERVER, BrokerSpec, fill, remember


def rules(spec: BrokerSpec) -> str:
    """The ACL file: Erlang terms, of which the first that fits decides."""
    topics = spec.topics
    revoked = "".join(f'{{deny, {{username, "{name}"}}, all, ["#"]}}.\n' for name in sorted(spec.revoked))
    return f"""\
%% Who reads and writes what. A user is the name in a certificate; a device's is its --id.
{revoked}{{allow, {{username, "{SERVER}"}}, all, ["{topics}/#"]}}.
{{allow, {{username, "{ENROLMENT}"}}, subscribe, ["{topics}/enrol/+/ask"]}}.
{{allow, {{username, "{ENROLMENT}"}}, publish, ["{topics}/enrol/+/told"]}}.
{{allow, {{username, "{CLAIM}"}}, publish, ["{topics}/enrol/+/ask"]}}.
{{allow, {{username, "{CLAIM}"}}, subscribe, ["{topics}/enrol/+/told"]}}.
{{deny, {{username, {{re, "^@"}}}}, all, ["#"]}}.
{{allow, all, publish, ["{topics}/up/${{username}}/#", "{topics}/enrol/${{username}}/ask"]}}.
{{allow, all, subscribe, ["{topics}/down/${{username}}/#", "{topics}/pub/#", "{topics}/enrol/${{username}}/told"]}}.
{{deny, all}}.
"""


def configuration(spec: BrokerSpec, place: Path) -> str:
    """What to add to ``emqx.conf`` (HOCON)."""
    host = f"[{spec.host}]" if ":" in spec.host else spec.host
    return f"""\
# EMQX 5 for federation {spec.federation}, written by `fedge broker config`: add it to emqx.conf, and put acl.conf where
# it says; read both again with `emqx ctl conf reload`.
# EMQX's dashboard (port 18083) has the user "admin" with the password "public" until you change it, and whoever enters
# there changes everything here: `emqx ctl admins passwd admin NEW`, or dashboard.listeners.http.bind = 0 for none.
listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.wss.default.enable = false
listeners.ssl.default {{
  bind = "{host}:{spec.port}"
  tcp_options.nodelay = true
  ssl_options {{
    cacertfile = "{place}/ca.crt"
    certfile = "{place}/broker.crt"
    keyfile = "{place}/broker.key"
    verify = verify_peer
    fail_if_no_peer_cert = true
    versions = ["tlsv1.3", "tlsv1.2"]
  }}
}}
mqtt {{
  peer_cert_as_username = cn
  max_packet_size = {spec.packet_limit}
  # A full queue discards the oldest message, which it has acknowledged.
  max_mqueue_len = {spec.queue}
  max_inflight = 1000
}}
authorization {{
  no_match = deny
  deny_action = ignore
  cache.enable = false
  sources = [ {{ type = file, enable = true, path = "{place}/acl.conf" }} ]
}}
"""


def write(folder: Path, spec: BrokerSpec) -> Path:
    """Write a folder with EMQX's configuration, its access rules and certificates; the path of the configuration.

    Raises:
        ConfigError: a file of the authority is missing, or the disk refuses.
    """
    fill(folder, spec, {"fedge.conf": configuration(spec, spec.at(folder)), "acl.conf": rules(spec)})
    remember(folder, "emqx", spec)
    return folder / "fedge.conf"

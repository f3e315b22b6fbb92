"""Attacks end to end that `bench-attacks --quick` leaves out: real commands, real brokers, and what refuses them."""

import time

import pytest

from broker_server.authority import REGISTRY, Authority
from broker_server.broker import find_mosquitto
from broker_server.broker_config import nats
from broker_server.broker_config.reload import reload_all
from broker_server.broker_config.spec import BrokerSpec
from broker_server.registry import standing
from edge_client.address import Address
from edge_client.errors import TransportError
from tests.attacks import enrolment, floods, speech
from tests.brokers import FEDERATION, Secured
from tests.federation import Serving, enrolled, federation, fedge
from tests.nats import free_ports, needs_nats

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")


@needs_mosquitto
def test_tampered_chunks_and_bundles_and_old_tampered_and_forged_offers_are_refused(tmp_path):
    with speech.scene(tmp_path) as scene:
        outcomes = [speech.tampered_chunk(scene), *speech.offers(scene)]
    assert [(one.attack, one.evidence) for one in outcomes if not one.refused] == []
    assert len(outcomes) == 5


@needs_mosquitto
def test_claims_serve_once_and_malformed_requests_get_no_certificate(tmp_path):
    with federation(tmp_path) as (authority, url), Serving(tmp_path) as server:
        outcomes = [enrolment.used_twice(authority, url, tmp_path), enrolment.expired(authority, url, tmp_path)]
        outcomes += enrolment.malformed(authority, url, tmp_path, server)
    assert [(one.attack, one.evidence) for one in outcomes if not one.refused] == []
    assert len(outcomes) >= 10


@needs_mosquitto
def test_an_upload_that_never_ends_keeps_nobody_from_the_round(tmp_path):
    outcome = floods.slow_loris(tmp_path)
    assert outcome.refused, outcome.evidence


@needs_nats
def test_on_nats_a_revoked_name_is_not_let_in_again_whoever_enrols_after_it(tmp_path):
    """NATS reads no revocation list: it knows names, and the certificate that is out there still carries this one."""
    authority = Authority.init(tmp_path / "authority", FEDERATION, ["localhost"], now=time.time())
    gone, other = (enrolled(authority, tmp_path / name, name, time.time()) for name in ("gone", "other"))
    port, client_port = free_ports(2)
    devices, _ = standing(authority.folder / REGISTRY, time.time())
    spec = BrokerSpec(FEDERATION, authority.folder, host="127.0.0.1", port=port, devices=devices)
    path = nats.write(tmp_path / "broker", spec, client_port)
    broker = Secured("nats", path, Address("127.0.0.1", port, tls=True), client_port, authority)

    def is_let_in(identity) -> bool:
        try:
            with broker.peer(identity.folder):
                return True
        except TransportError:
            return False

    broker.start()
    try:
        assert is_let_in(gone)
        assert "start it anew" in fedge("revoke", "gone", "-a", authority.folder)
        broker.stop()
        broker.start()
        assert (is_let_in(gone), is_let_in(other)) == (False, True)
        late = enrolled(authority, tmp_path / "late", "late", time.time())
        devices, revoked = standing(authority.folder / REGISTRY, time.time())
        reload_all(authority.folder, devices=devices, revoked=revoked)
        broker.stop()
        broker.start()
        assert (is_let_in(gone), is_let_in(other), is_let_in(late)) == (False, True, True)
    finally:
        broker.stop()

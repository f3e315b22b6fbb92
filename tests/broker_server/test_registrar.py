"""Who gets a certificate, once; and each attack on that, refused with its reason."""

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_server.authority import REGISTRY
from broker_server.registrar import Again, Ignore, Issue, Refuse, Standing, Wait, judge
from broker_server.registry import Registry
from edge_client.errors import ConfigError
from edge_client.trust.certificate import make_request
from edge_client.trust.keys import SigningKey
from edge_client.wire import enrolment as wire
from edge_client.wire import envelope
from tests.office import DAY, NONCE, NOW, WEEK, Device, Office, issued

MAXIMUM = {"max_examples": 60, "suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


@pytest.fixture
def office(tmp_path):
    return Office(tmp_path)


def test_a_claim_becomes_a_certificate_of_the_devices_own_key(office):
    claim, device = office.claim(), Device(office, "pi-7")
    told = device.ask(claim)
    certificate = issued(told)
    assert (certificate.name, certificate.public) == ("pi-7", device.key.public)
    assert certificate.issued_by(office.authority.certificate)
    assert told.authority == office.authority.certificate.der
    assert (told.pins, told.issued, told.nonce) == (office.authority.pins, NOW, NONCE)
    assert office.registry.keys(NOW) == {"pi-7": device.key.public}
    assert office.registry.claim(claim.user).state == "issued"


def test_an_ask_whose_answer_was_lost_gets_the_same_certificate_again(office):
    claim, device = office.claim(), Device(office, "pi-7")
    first = device.ask(claim)
    # Also long after, when the claim has expired, and after a restart of the device, with another nonce.
    for later in (1.0, 3 * WEEK):
        assert device.ask(claim, NOW + later).certificate == first.certificate
    payload = device.payload(claim.user, claim.signing_key, nonce=bytes(16))
    again = office.told(claim.user, office.registrar.answer(claim.user, payload, NOW + 2))
    assert (again.certificate, again.nonce) == (first.certificate, bytes(16))
    assert len(office.registry.devices()) == 1


# Claims.


def test_a_claim_used_twice_is_refused(office):
    claim = office.claim()
    Device(office, "pi-7").ask(claim)
    for client in ("pi-7", "pi-8"):
        told = Device(office, client).ask(claim)
        assert told.status == "refused"
        assert "used already, with another key" in told.detail
        assert not told.certificate
    assert list(office.registry.keys(NOW)) == ["pi-7"]


def test_a_claim_is_for_one_name_even_for_the_same_key(office):
    claim, device = office.claim(), Device(office, "pi-7")
    device.ask(claim)
    told = Device(office, "pi-8", device.key).ask(claim)
    assert (told.status, told.detail) == ("refused", "the claim was used already, for 'pi-7'")


def test_a_claim_after_its_expiry_is_refused(office):
    claim = office.claim()
    assert Device(office, "pi-7").ask(claim, NOW + WEEK).detail.startswith("the claim has expired")
    assert not office.registry.keys(NOW)
    assert Device(office, "pi-7").ask(claim, NOW + WEEK - 1).status == "issued"


def test_another_federations_claim_is_refused(office, tmp_path):
    other = Office(tmp_path / "other", number=1)
    claim, device = other.claim(), Device(office, "pi-7")
    told = device.ask(claim)
    assert told.status == "refused"
    assert "no claim of this federation" in told.detail
    # Nor does it help to call it like one of this federation's.
    mine = office.claim()
    answer = office.registrar.answer(mine.user, device.payload(mine.user, claim.signing_key), NOW)
    assert answer.told is None
    assert "not signed with the claim's key" in answer.lines[0]


def test_a_claim_that_was_withdrawn_is_refused(office):
    claim = office.claim()
    office.registry.withdraw(claim.user, NOW)
    assert Device(office, "pi-7").ask(claim).detail == "the claim was withdrawn"


def test_a_refusal_uses_no_claim_up(office):
    claim = office.claim()
    Device(office, "pi-7").ask(office.claim())
    assert Device(office, "pi-7").ask(claim).status == "refused"
    assert Device(office, "pi-8").ask(claim).status == "issued"


def test_of_two_that_ask_with_one_claim_one_gets_a_certificate_in_either_order(tmp_path):
    for turn in range(2):
        office = Office(tmp_path / str(turn))
        claim = office.claim()
        devices = [Device(office, f"pi-{number}") for number in range(2)]
        told = [devices[number].ask(claim) for number in (turn, 1 - turn, turn, 1 - turn)]
        assert [one.status for one in told] == ["issued", "refused"] * 2


# Names and keys.


def test_a_name_that_another_device_has_is_refused(office):
    Device(office, "pi-7").ask(office.claim())
    told = Device(office, "pi-7").ask(office.claim())
    assert told.status == "refused"
    assert "another device" in told.detail
    assert "take another --id" in told.detail


def test_a_name_whose_certificate_has_expired_is_free_for_a_new_key(office):
    Device(office, "pi-7").ask(office.claim())
    late = Device(office, "pi-7")
    assert late.ask(office.claims(seconds=100 * DAY)[0], NOW + 30 * DAY).status == "issued"


def test_a_name_that_was_revoked_is_nobodys_until_what_was_revoked_has_expired(office):
    """NATS and EMQX know names only: enrolled anew, the name would let the revoked certificate in again."""
    Device(office, "pi-7").ask(office.claim())
    office.registry.revoke("pi-7", NOW)
    claim = office.claims(seconds=100 * DAY)[0]
    told = Device(office, "pi-7").ask(claim, NOW + 29 * DAY)
    assert told.status == "refused"
    assert "'pi-7' was revoked, and what was revoked expires on 2027-02-14; take another --id" in told.detail
    assert office.registry.standing(NOW + 29 * DAY) == ((), ("pi-7",))
    assert Device(office, "pi-7").ask(claim, NOW + 31 * DAY).status == "issued"


def test_what_a_person_has_approved_is_not_issued_under_a_name_that_was_revoked(tmp_path):
    office = Office(tmp_path, "ask")
    first, second = office.claims(2)
    late, quick = Device(office, "pi-7"), Device(office, "pi-7")
    for device, claim in ((late, first), (quick, second)):
        device.ask(claim)
        office.registry.decide(claim.user, approved=True)
    assert quick.ask(second).status == "issued"
    office.registry.revoke("pi-7", NOW)
    assert "was revoked" in late.ask(first).detail


def test_a_key_is_one_devices(office):
    device = Device(office, "pi-7")
    device.ask(office.claim())
    assert "this key belongs to 'pi-7'" in Device(office, "pi-8", device.key).ask(office.claim()).detail


def test_a_device_may_enrol_again_with_its_key_and_another_claim(office):
    device = Device(office, "pi-7")
    first = issued(device.ask(office.claim()))
    second = issued(device.ask(office.claim(), NOW + 5))
    assert second.serial != first.serial
    assert office.registry.keys(NOW) == {"pi-7": device.key.public}


@pytest.mark.parametrize("client", ["fs-1", "fd-1"])
def test_a_name_that_is_fedges_own_is_refused(office, client):
    told = Device(office, client).ask(office.claim())
    assert told.status == "refused"
    assert "fedge's own" in told.detail


@pytest.mark.parametrize("client", ["broker.example", "Broker.Example", "localhost"])
def test_a_name_that_the_broker_has_is_refused(office, client):
    told = Device(office, client).ask(office.claim())
    assert told.status == "refused"
    assert "the broker is called so" in told.detail
    with pytest.raises(ConfigError, match="the broker is called so"):
        office.authority.issue(make_request(SigningKey.generate(), client), client, 1.0, now=NOW)


# Revocation.


def test_a_revoked_device_is_refused_at_once_whatever_it_asks(office):
    claim, device = office.claim(), Device(office, "pi-7")
    device.ask(claim)
    office.registry.revoke("pi-7", NOW)
    assert office.registry.keys(NOW) == {}
    assert device.renew(NOW).detail == "'pi-7' is revoked"
    assert "this key was revoked as 'pi-7'" in device.ask(claim).detail
    for client in ("pi-7", "pi-8"):
        told = Device(office, client, device.key).ask(office.claim())
        assert told.status == "refused"
        assert "this key was revoked" in told.detail


# Renewal.


def test_a_certificate_is_renewed_in_its_last_third_and_before_that_the_same(office):
    device = Device(office, "pi-7")
    first = device.ask(office.claim())
    assert device.renew(NOW + 19 * DAY).certificate == first.certificate
    second = issued(device.renew(NOW + 21 * DAY))
    assert second.expires == NOW + 51 * DAY
    assert second.public == device.key.public
    assert issued(device.renew(NOW + 21 * DAY + 1)) == second
    assert office.registry.keys(NOW + 50 * DAY) == {"pi-7": device.key.public}


def test_what_is_no_renewal(office):
    device, other = Device(office, "pi-7"), Device(office, "pi-8")
    device.ask(office.claim())
    registrar = office.registrar
    assert other.renew(NOW).detail == "'pi-8' is not enrolled in this federation"
    assert "expired" in device.renew(NOW + 30 * DAY).detail
    forged = registrar.answer("pi-7", device.payload("pi-7", other.key), NOW)
    assert forged.told is None
    assert "not signed with the device's key" in forged.lines[0]
    other.client = "pi-7"
    told = office.told("pi-7", registrar.answer("pi-7", other.payload("pi-7", device.key), NOW + 25 * DAY))
    assert "renewed for the same key" in told.detail
    # With its own key in another's name, or in its own name by another's topic.
    for user, client in (("pi-7", "pi-9"), ("pi-9", "pi-7")):
        asking = Device(office, client, device.key)
        answer = registrar.answer(user, asking.payload(user, device.key), NOW + 25 * DAY)
        assert answer.told is None
        assert "asks for the name" in answer.lines[0]


# Approval.


def test_where_a_person_decides_nothing_is_issued_before(tmp_path):
    office = Office(tmp_path, "ask")
    claim, device = office.claim(), Device(office, "pi-7")
    answer = office.registrar.answer(claim.user, device.payload(claim.user, claim.signing_key), NOW)
    assert answer.pending
    assert office.told(claim.user, answer).status == "pending"
    assert answer.lines == ("enrolment: 'pi-7' waits for approval: fedge approve pi-7",)
    again = office.registrar.answer(claim.user, device.payload(claim.user, claim.signing_key), NOW + 60)
    assert (again.pending, again.lines) == (True, ())
    assert not office.registry.keys(NOW)
    (waiting,) = office.registry.claims("pending")
    assert (waiting.client, waiting.device, waiting.asked) == ("pi-7", device.key.public, NOW)
    office.registry.decide(claim.user, approved=True)
    # Also after the claim has expired: it was asked in time.
    first = device.ask(claim, NOW + 2 * WEEK)
    assert first.status == "issued"
    assert device.ask(claim, NOW + 2 * WEEK).certificate == first.certificate


def test_what_a_person_refuses_stays_refused(tmp_path):
    office = Office(tmp_path, "ask")
    claim, device = office.claim(), Device(office, "pi-7")
    device.ask(claim)
    office.registry.decide(claim.user, approved=False, detail="no")
    assert [device.ask(claim, NOW + later).detail for later in (0.0, WEEK)] == ["no", "no"]
    assert not office.registry.keys(NOW)


def test_what_was_approved_is_one_key_and_one_name(tmp_path):
    """Whoever has the claim too cannot put his own key in the place of the one that was approved."""
    office = Office(tmp_path, "ask")
    claim, device = office.claim(), Device(office, "pi-7")
    device.ask(claim)
    office.registry.decide(claim.user, approved=True)
    assert "with another key" in Device(office, "pi-7").ask(claim).detail
    assert "for 'pi-7'" in Device(office, "pi-8", device.key).ask(claim).detail
    assert issued(device.ask(claim)).public == device.key.public


def test_names_that_fit_a_pattern_are_approved_and_others_wait(tmp_path):
    office = Office(tmp_path, ("pi-*", "lab-?"))
    assert Device(office, "pi-7").ask(office.claim()).status == "issued"
    assert Device(office, "lab-1").ask(office.claim()).status == "issued"
    assert Device(office, "lab-12").ask(office.claim()).status == "pending"


# Malformed, oversized, of another key or name.


def csr(office, wanted):
    claim, device = office.claim(), Device(office, "pi-7")
    return office.told(
        claim.user,
        office.registrar.answer(claim.user, device.payload(claim.user, claim.signing_key, csr=wanted), NOW),
    )


def test_a_request_for_another_name_is_refused(office):
    for name in ("@server", "@enrol", "pi-8"):
        told = csr(office, make_request(SigningKey.generate(), name))
        assert told.status == "refused"
        assert f"{name!r}; expected 'pi-7'" in told.detail
    assert not office.registry.keys(NOW)


def test_a_request_that_somebody_else_signed_is_refused(office):
    mine, theirs = SigningKey.generate(), SigningKey.generate()
    request = make_request(mine, "pi-7").replace(mine.public, theirs.public)
    assert "not signed by the key" in csr(office, request).detail


def test_an_oversized_request_is_dropped(office):
    claim = office.claim()
    body = msgspec.msgpack.encode(["pi-7", bytes(2049), NONCE, ""])
    answer = office.registrar.answer(claim.user, envelope.wrap(101, body, bytes(64)), NOW)
    assert answer.told is None
    assert "dropped a message" in answer.lines[0]
    assert "2048" in answer.lines[0]


@settings(**MAXIMUM)
@given(st.data())
def test_malformed_requests_are_refused_and_use_nothing_up(office, data):
    claim = office.registry.claims("open")
    made = office.claim() if not claim else None
    # One claim for all examples: none of them may use it up.
    office.kept = made or office.kept
    good = make_request(SigningKey.generate(), "pi-7")
    noise = data.draw(st.binary(max_size=200))
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(good)), st.integers(0, len(good)))))
    bad = data.draw(
        st.sampled_from([noise or b"\0", good[:start] + noise + good[end:], good[: len(good) - 1 - start // 2]])
    )
    if bad in (good, b""):
        return
    device = Device(office, "pi-7")
    payload = device.payload(office.kept.user, office.kept.signing_key, csr=bad)
    told = office.told(office.kept.user, office.registrar.answer(office.kept.user, payload, NOW))
    assert told.status == "refused"
    assert "the certificate request" in told.detail
    assert not office.registry.keys(NOW)
    assert office.registry.claim(office.kept.user).state == "open"


@settings(**MAXIMUM)
@given(st.binary(max_size=400), st.data())
def test_whatever_is_sent_nothing_is_signed_for_who_has_not_shown_who_he_is(office, noise, data):
    """Not even a refusal, for it would end the enrolment of the device whose nonce it repeats."""
    if not office.registry.claims("open"):
        office.kept = office.claim()
    claim = office.kept
    good = Device(office, "pi-7").payload(claim.user, claim.signing_key)
    position = data.draw(st.integers(0, len(good) - 1))
    changed = good[:position] + bytes([good[position] ^ data.draw(st.integers(1, 255))]) + good[position + 1 :]
    forged = Device(office, "pi-7").payload(claim.user, SigningKey.generate(), csr=noise or b"\0")
    for payload in (noise, changed, forged):
        answer = office.registrar.answer(claim.user, payload, NOW)
        assert answer.told is None
        assert len(answer.lines) == 1
    assert not office.registry.keys(NOW)


def test_an_ask_on_anothers_topic_is_ignored(office):
    mine, theirs = office.claims(2)
    payload = Device(office, "pi-7").payload(mine.user, mine.signing_key)
    answer = office.registrar.answer(theirs.user, payload, NOW)
    assert answer.told is None
    assert "not signed with the claim's key" in answer.lines[0]


def test_a_server_whose_clock_cannot_be_right_certifies_nothing(office):
    claim = office.claim()
    answer = office.registrar.answer(claim.user, Device(office, "pi-7").payload(claim.user, claim.signing_key), 1e9)
    assert answer.told is None
    assert "the clock shows 2001-09-09" in answer.lines[0]


def test_what_is_refused_waits_for_nobody_who_writes(office):
    """A flood of requests that come to nothing never takes the right to write, which `fedge revoke` needs."""
    claim, device = office.claim(), Device(office, "pi-7")
    device.ask(claim)
    forged = device.payload(claim.user, SigningKey.generate())
    with Registry.open(office.folder / REGISTRY) as other, other.group():
        assert Device(office, "pi-8").ask(claim).status == "refused"
        assert device.ask(claim).status == "issued"
        assert office.registrar.answer(claim.user, forged, NOW).told is None


# All that is decided, by table.

PUBLIC, OTHER = bytes(32), bytes([1]) * 32


def decide(office, *, rule="claim", signed=True, now=NOW, **standing):
    return judge("@claim-00000000", "pi", PUBLIC, lambda _: signed, Standing(*standing.values()), rule, now)


def test_what_is_decided_depends_on_claim_names_and_keys_alone(office):
    claim = office.registry.claim(office.claim().user)
    nobody = {"named": None, "owner": None}
    assert decide(office, claim=claim, **nobody) == Issue()
    assert decide(office, claim=claim, **nobody, rule="ask") == Wait()
    assert decide(office, claim=claim._replace(state="approved"), **nobody, rule="ask") == Issue()
    assert isinstance(decide(office, claim=claim, **nobody, signed=False), Ignore)
    assert isinstance(decide(office, claim=claim._replace(device=OTHER), **nobody), Refuse)
    device = Device(office, "pi")
    device.ask(office.claim())
    row = office.registry.device("pi")._replace(public=PUBLIC)
    bound = claim._replace(state="issued", client="pi", device=PUBLIC)
    assert decide(office, claim=bound, named=row, owner=row) == Again(row)
    assert isinstance(decide(office, claim=bound, named=row, owner=row, now=row.expires), Refuse)
    assert isinstance(decide(office, claim=bound, named=row._replace(revoked=NOW), owner=None), Refuse)


def test_told_is_for_the_user_who_asked(office):
    claim = office.claim()
    answer = office.registrar.answer(claim.user, Device(office, "pi-7").payload(claim.user, claim.signing_key), NOW)
    with pytest.raises(AssertionError):
        office.told("@claim-00000000", answer)
    assert wire.Told is type(office.told(claim.user, answer))

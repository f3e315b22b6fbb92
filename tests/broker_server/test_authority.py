"""An authority certifies what it should and nothing else; its folder is whole or made anew."""

import stat
import subprocess
import threading

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker_server.authority import Authority, telling_brokers
from edge_client.errors import ConfigError
from edge_client.trust.certificate import Certificate, make_request
from edge_client.trust.keys import SigningKey
from tests.office import DAY, NOW, WEEK, Office

KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    return Office(tmp_path_factory.mktemp("office") / "authority")


def load(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_its_folder_holds_what_broker_server_and_enrolment_need_for_the_owner_alone(office):
    names = {entry.name for entry in office.folder.iterdir() if not entry.name.startswith("registry.db-")}
    pairs = {f"{name}.{end}" for name in ("ca", "broker", "server", "enrol") for end in ("key", "crt")}
    assert names == pairs | {"crl.pem", "federation.key", "federation.pub", "registry.db", "registry.db.lock"}
    assert stat.S_IMODE(office.folder.stat().st_mode) == 0o700
    for name in names - {"registry.db.lock"}:
        assert stat.S_IMODE((office.folder / name).stat().st_mode) == 0o600, name


@pytest.mark.parametrize(("name", "user"), [("server", "@server"), ("enrol", "@enrol")])
def test_users_of_its_own_have_certificates_for_clients(office, name, user):
    found = Certificate.parse((office.folder / f"{name}.crt").read_bytes())
    assert (found.name, found.federation) == (user, "toys")
    assert found.issued_by(office.authority.certificate)
    assert found.public == SigningKey.load(office.folder / f"{name}.key").public
    usage = load(office.folder / f"{name}.crt").extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_the_brokers_certificate_names_its_hosts_and_is_for_no_client(office):
    found = load(office.folder / "broker.crt").extensions
    hosts = found.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(host.value) for host in hosts] == ["broker.example", "localhost", "127.0.0.1", "::1"]
    assert list(found.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert office.authority.host == "broker.example"


def test_the_broker_can_be_named_anew(tmp_path):
    authority, before = Office(tmp_path).authority, (tmp_path / "broker.key").read_bytes()
    authority.rename_broker(["10.0.0.9", "new.example"])
    found = load(tmp_path / "broker.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(host.value) for host in found] == ["10.0.0.9", "new.example", "localhost", "127.0.0.1", "::1"]
    assert authority.host == "10.0.0.9"
    assert (tmp_path / "broker.key").read_bytes() != before
    with pytest.raises(ConfigError, match="--host"):
        authority.rename_broker(["a..b"])


def test_brokers_are_told_by_one_at_a_time(tmp_path):
    done = []

    def tell(number):
        with telling_brokers(tmp_path):
            done.append(number)
            with (tmp_path / "one").open("x"):
                pass
            (tmp_path / "one").unlink()

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(8))
    assert not (tmp_path / "one").exists()


def test_openssl_agrees(office):
    for name in ("broker", "server", "enrol"):
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", office.folder / "ca.crt", "-crl_check", "-CRLfile",
             office.folder / "crl.pem", office.folder / f"{name}.crt"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_it_is_read_back_and_never_made_again(office):
    assert Authority.load(office.folder).certificate == office.authority.certificate
    with pytest.raises(ConfigError, match="already"):
        Authority.init(office.folder, "toys", ["h"], now=NOW)


def test_one_that_a_power_cut_left_half_is_made_anew(tmp_path):
    Office(tmp_path)
    (tmp_path / "ca.crt").unlink()
    with pytest.raises(ConfigError, match="fedge ca init"):
        Authority.load(tmp_path)
    assert Authority.init(tmp_path, "toys", ["h"], now=NOW).key is not None


def test_a_host_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--host"):
        Authority.init(tmp_path / "a", "toys", ["a..b"], now=NOW)
    assert not (tmp_path / "a").exists()


def test_a_devices_certificate_holds_from_long_ago_for_so_many_days(office):
    made = office.authority.issue(make_request(KEY, "pi-7"), "pi-7", 30.0, now=NOW)
    assert (made.name, made.federation, made.public, made.expires) == ("pi-7", "toys", KEY.public, NOW + 30 * DAY)
    assert made.issued_by(office.authority.certificate)
    found = x509.load_der_x509_certificate(made.der)
    assert found.not_valid_before_utc.year == 2020
    extensions = found.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize("client", ["fs-1", "fd-1", "@server", "a/b", "#", "", "a" * 65])
def test_nobody_is_certified_under_a_name_that_no_device_has(office, client):
    request = make_request(KEY, client[:64] or "x")
    with pytest.raises(ConfigError, match="cannot be a device's name"):
        office.authority.issue(request, client, 30.0, now=NOW)


def test_without_its_key_it_certifies_nothing(tmp_path):
    Office(tmp_path)
    (tmp_path / "ca.key").rename(tmp_path / "safe")
    authority = Authority.load(tmp_path)
    for forbidden in (
        lambda: authority.issue(make_request(KEY, "pi-7"), "pi-7", 30.0, now=NOW),
        lambda: authority.claims(1, WEEK, "mqtt://h", now=NOW),
        lambda: authority.write_crl((), now=NOW),
    ):
        with pytest.raises(ConfigError, match=r"ca\.key is not there"):
            forbidden()


@pytest.mark.parametrize("name", ["ca.key", "federation.key"])
def test_a_key_that_others_may_read_or_that_is_anothers_is_refused(tmp_path, name):
    Office(tmp_path)
    (tmp_path / name).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Authority.load(tmp_path)
    SigningKey.generate().save(tmp_path / name)
    with pytest.raises(ConfigError, match=r"is not the key of|does not list"):
        Authority.load(tmp_path)


def test_claims_are_one_user_at_the_broker_with_keys_of_their_own(office):
    made = office.authority.claims(3, WEEK, "mqtts://broker.example:8883", now=NOW)
    assert len({claim.user for claim, _ in made}) == 3
    assert len({certificate.public for _, certificate in made}) == 3
    for claim, certificate in made:
        assert certificate.name == "@claim"
        assert certificate.expires == claim.expires == NOW + WEEK
        assert claim.signing_key.public == certificate.public


def test_the_list_of_revoked_certificates_is_valid_whatever_the_brokers_clock_says(office, tmp_path):
    made = [office.authority.issue(make_request(KEY, "pi-7"), "pi-7", 30.0, now=NOW) for _ in range(2)]
    path = office.authority.write_crl([(made[0].serial, NOW)], now=NOW + 5)
    found = x509.load_pem_x509_crl(path.read_bytes())
    assert found.is_signature_valid(office.authority.key.private.public_key())
    assert [f"{entry.serial_number:x}" for entry in found] == [made[0].serial]
    assert found.last_update_utc.year == 2020
    assert found.next_update_utc.timestamp() == office.authority.certificate.expires
    for certificate, good in zip(made, (False, True), strict=True):
        (tmp_path / "device.crt").write_bytes(certificate.pem)
        done = subprocess.run(
            ["openssl", "verify", "-CAfile", office.folder / "ca.crt", "-crl_check", "-CRLfile", path,
             tmp_path / "device.crt"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode == 0) == good

"""TLS as a device sees it: what it refuses, and what it says when something is refused."""

import asyncio
import datetime as dt
import socket
import ssl
import sys
import threading
from contextlib import asynccontextmanager, suppress

import pytest

from broker_server.cli import serve, simulate
from edge_client import cli
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError
from edge_client.tls import Tls, explain
from edge_client.transport import MqttLink
from tests.certificates import Certificates
from tests.toy import toy_bundle


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("fleet") / "authority")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("others") / "other")


class Reasons:
    """A handler that keeps why connections ended."""

    def __init__(self):
        self.reasons, self.up = [], False

    def connected(self):
        self.up = True

    def disconnected(self, reason):
        self.reasons.append(reason)

    def message(self, topic, payload):
        raise AssertionError(topic)


@asynccontextmanager
async def broker(authority, *, shows="broker", folder=None):
    """A TLS server that asks for certificates and answers CONNECT; asyncio's would hang up without saying why."""
    place = folder or authority.folder
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.folder / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(place / f"{shows}.crt", place / f"{shows}.key")

    def serve(plain):
        with suppress(OSError), context.wrap_socket(plain, server_side=True) as secured:
            if secured.recv(1000):
                secured.sendall(b"\x20\x02\x00\x00")
            while secured.recv(1000):
                pass

    def accept():
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    accepting.join()


def refusal(tls, host="127.0.0.1", port=None, **how):
    """What a link says that is refused once, and what a peer says; both on one line."""

    async def play():
        async with broker(**how) as there:
            address = Address(host, port or there, tls=True)
            link, handler = MqttLink(address, "a", attempts=1, tls=tls), Reasons()
            with pytest.raises(TransportError):
                await asyncio.wait_for(link.run(handler), 20)
            said = ""
            try:
                await asyncio.to_thread(Peer(address, "b", tls=tls).__enter__)
            except TransportError as error:
                said = str(error)
            return handler.reasons[0], said

    found = asyncio.run(play())
    assert all("\n" not in text and "_ssl.c" not in text for text in found)
    return found


def test_a_host_is_not_known_by_the_common_name_of_a_certificate(authority):
    """In a device's certificate that is its --id, which the device chooses."""
    assert not Tls.of(authority.device("pi")).context().hostname_checks_common_name
    assert not Tls(authority.folder / "ca.crt").context().hostname_checks_common_name


def test_who_has_a_certificate_is_let_in(authority):
    async def play():
        async with broker(authority) as port:
            link = MqttLink(Address("localhost", port, tls=True), "a", attempts=1, tls=Tls.of(authority.device("pi")))
            handler = Reasons()
            life = asyncio.ensure_future(link.run(handler))
            async with asyncio.timeout(10):
                while not handler.up:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await link.close()
            await life
            assert handler.reasons == []

    asyncio.run(play())


def test_no_certificate(authority):
    for said in refusal(Tls(authority.folder / "ca.crt"), authority=authority):
        assert "the broker asks for a certificate and there is none to show" in said


def test_a_certificate_of_another_authority(authority, other):
    identity = other.device("pi")
    tls = Tls(authority.folder / "ca.crt", identity / "device.crt", identity / "device.key")
    for said in refusal(tls, authority=authority):
        assert "of another authority" in said


def test_a_broker_of_another_authority(authority, other):
    for said in refusal(Tls.of(authority.device("pi")), authority=other):
        assert "the broker shows a certificate of an authority that this device does not trust" in said


def test_a_broker_of_another_name(authority, tmp_path):
    authority.issue(tmp_path, "broker", "broker", hosts=("broker.example",))
    for said in refusal(Tls.of(authority.device("pi")), authority=authority, folder=tmp_path):
        assert "the broker's certificate is for other hosts" in said
        assert "127.0.0.1" in said


def test_a_device_cannot_pass_for_the_broker(authority, tmp_path):
    """A certificate that says for clients only, even with the broker's name in it."""
    thief = authority.device("thief")
    said, _ = refusal(Tls.of(authority.device("pi")), authority=authority, folder=thief, shows="device")
    assert "does not trust" in said


@pytest.mark.parametrize(("since", "until"), [((2050, 1, 1), (2059, 1, 1)), ((2020, 1, 1), (2021, 1, 1))])
def test_a_brokers_certificate_that_is_not_valid_now_names_the_clock(authority, tmp_path, since, until):
    dates = {"since": dt.datetime(*since), "until": dt.datetime(*until)}
    authority.issue(tmp_path, "broker", "broker", hosts=("127.0.0.1",), **dates)
    state = "has expired" if until[0] < 2026 else "is not valid yet"
    for said in refusal(Tls.of(authority.device("pi")), authority=authority, folder=tmp_path):
        assert f"the broker's certificate {state} by this device's clock (20" in said


def test_a_port_without_tls(authority):
    async def play():
        async def serve(reader, writer):
            await reader.read(10)
            writer.write(b"\x20\x02\x00\x00garbage")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        handler = Reasons()
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1], tls=True)
        with pytest.raises(TransportError, match="does not speak TLS"):
            await MqttLink(address, "a", attempts=1, tls=Tls.of(authority.device("pi"))).run(handler)
        server.close()

    asyncio.run(play())


OWN = {
    "expired": ({"until": dt.datetime(2021, 5, 6)}, r"device\.crt has expired on 2021-05-06 00:00 UTC.*clock says 20"),
    "not yet": (
        {"since": dt.datetime(2050, 5, 6)},
        r"device\.crt is valid from 2050-05-06 00:00 UTC on.*set the clock",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_an_own_certificate_that_is_not_valid_now_names_the_clock_and_is_tried_again(authority, name):
    dates, pattern = OWN[name]
    tls = Tls.of(authority.device(f"pi-{name.replace(' ', '-')}", **dates))
    with pytest.raises(TransportError, match=pattern):
        tls.context()

    async def play():
        # Nobody is asked: only a clock that is set, or another certificate, changes anything.
        link, handler = MqttLink(Address("127.0.0.1", 1, tls=True), "a", attempts=2, slowest=0.01, tls=tls), Reasons()
        with pytest.raises(TransportError, match=pattern):
            await link.run(handler)
        assert len(handler.reasons) == 2

    asyncio.run(play())


def test_a_certificate_that_is_replaced_is_used_from_the_next_connection_on(authority):
    expired = {"until": dt.datetime(2021, 1, 1)}
    tls = Tls.of(authority.device("pi-renewed", **expired))

    async def play():
        async with broker(authority) as port:
            link, handler = MqttLink(Address("127.0.0.1", port, tls=True), "a", slowest=0.01, tls=tls), Reasons()
            life = asyncio.ensure_future(link.run(handler))
            async with asyncio.timeout(10):
                while not handler.reasons:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                authority.device("pi-renewed")
                while not handler.up:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await link.close()
            await life

    asyncio.run(play())


def broken(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "garbage": b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"}[how]
        )


@pytest.mark.parametrize("how", ["missing", "empty", "garbage"])
@pytest.mark.parametrize("file", ["ca.crt", "device.crt", "device.key"])
def test_a_file_that_cannot_be_used_is_named(authority, file, how):
    folder = authority.device("pi-broken")
    broken(folder / file, how)
    with pytest.raises(TransportError, match=rf"{folder / file}: .*; expected ") as found:
        Tls.of(folder).context()
    assert "\n" not in str(found.value)


def test_a_key_of_another_certificate_is_named(authority):
    folder, second = authority.device("pi-1"), authority.device("pi-2")
    with pytest.raises(TransportError, match=r"device\.key: key values mismatch; expected the private key of"):
        Tls(folder / "ca.crt", folder / "device.crt", second / "device.key").context()


def test_old_versions_of_tls_are_not_spoken(authority):
    assert Tls.of(authority.device("pi")).context().minimum_version == ssl.TLSVersion.TLSv1_2
    assert Tls().context().check_hostname


def test_any_error_becomes_one_line():
    assert explain(ssl.SSLError(1, "[SSL: ODD_THING] odd thing (_ssl.c:1002)")) == "odd thing"
    assert explain(ConnectionResetError(104, "Connection reset by peer")) == "Connection reset by peer"
    assert explain(OSError()) == "OSError"


def test_an_identity_is_found_in_a_devices_folder_and_in_an_authoritys(authority, tmp_path):
    folder = authority.device("pi")
    assert Tls.found(folder) == Tls(folder / "ca.crt", folder / "device.crt", folder / "device.key")
    assert Tls.found(authority.folder) == Tls.of(authority.folder, "server")
    assert Tls.found(tmp_path) is None


COMMANDS = {
    "join": ["join", "mqtt://broker.example", "--id", "pi", "--data", "x.npz"],
    "doctor": ["doctor", "mqtt://broker.example"],
    "doctor of a broker": ["doctor", "--broker", "mqtt://broker.example"],
    "serve": ["serve", "federation.toml"],
    "simulate": ["simulate", "federation.toml"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_go_over_a_network_in_the_open_only_when_told_to(tmp_path, name, monkeypatch, capsys):
    (tmp_path / "toy.fedge").write_bytes(toy_bundle())
    (tmp_path / "federation.toml").write_text(
        '[federation]\nname = "f"\nbundle = "toy.fedge"\n[broker]\nurl = "mqtt://broker.example"\n'
        '[simulation]\ndata = "x.npz"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedge", *COMMANDS[name]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("use mqtts://, or say --insecure") == 1
    assert "Traceback" not in said


def test_insecure_is_an_option_of_every_command_that_connects():
    for command in (serve, simulate, cli.doctor, cli.join):
        assert "insecure" in {parameter.name for parameter in command.params}

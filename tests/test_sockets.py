"""Whom a device and a server speak to, in every call to the kernel: the broker, and nobody else."""

import subprocess
import sys

import pytest

from broker_server.broker import find_mosquitto
from tests.federation import Joining, Running, Serving, claims, federation
from tests.sockets import Named, needs_notices, watched

pytestmark = needs_notices
ELSEWHERE = """
import contextlib, ctypes, socket, struct, threading
with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
    plain.sendto(b"usage", ("127.0.0.2", 4001))
    plain.sendmsg([b"usage"], [], 0, ("127.0.0.3", 4002))
with contextlib.suppress(OSError):
    socket.create_connection(("::1", 4003))
with contextlib.suppress(OSError):
    socket.getaddrinfo("telemetry.invalid", 443)
socket.create_server(("127.0.0.1", 0)).close()

def native():
    libc = ctypes.CDLL(None)
    libc.connect(libc.socket(2, 1, 0), struct.pack("=H", 2) + struct.pack("!HI8x", 4004, 0x7F000004), 16)

thread = threading.Thread(target=native)
thread.start()
thread.join()
"""


@pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
def test_from_its_enrolment_until_it_leaves_a_device_speaks_to_the_broker_alone(tmp_path, monkeypatch):
    # What fedge sets itself has to be enough.
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    device, office = set(), set()
    with federation(tmp_path, more="[transfer]\ninline = 0\nchunk = 1024\nspread = 0.0\n") as (authority, url):
        url = url.replace("localhost", "127.0.0.1")
        port = int(url.rsplit(":", 1)[1])
        file = tmp_path / "federation.toml"
        file.write_text(file.read_text().replace("localhost", "127.0.0.1"))
        (claim,) = claims(authority, url)
        claim.save(tmp_path / "claim")
        with watched(office, lambda: Serving(tmp_path)) as server:
            enrolling = ("enroll", tmp_path / "claim", "--id", "pi-7", "--state", tmp_path / "pi-7")
            with watched(device, lambda: Running(*enrolling)) as enrolment:
                assert enrolment.process.wait(timeout=120) == 0
            assert device == {Named("connect", "127.0.0.1", port)}
            device.clear()
            with watched(device, lambda: Joining(tmp_path, url, "pi-7")) as joined:
                server.until("ended: 3 rounds are done")
            assert joined.process.returncode == 0
    assert device == {Named("connect", "127.0.0.1", port)}
    # It asks its own machine for the name of who runs it.
    assert {one for one in office if not one.host.startswith("/")} == {Named("connect", "127.0.0.1", port)}


def test_one_that_speaks_to_others_is_seen_whichever_way_it_does(monkeypatch):
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
    seen: set[Named] = set()
    process = watched(seen, lambda: subprocess.Popen([sys.executable, "-c", ELSEWHERE]))
    assert process.wait(timeout=60) == 0
    assert Named("sendto", "127.0.0.2", 4001) in seen
    assert Named("sendmsg", "127.0.0.3", 4002) in seen
    assert Named("connect", "::1", 4003) in seen
    assert Named("connect", "127.0.0.4", 4004) in seen
    assert Named("listen", "anybody", 0) in seen
    assert any(one.port == 53 for one in seen), seen

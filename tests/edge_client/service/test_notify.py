"""What systemd hears, and the pulse that its watchdog hangs on."""

import socket
import threading

import pytest

from edge_client.service.notify import Notifier, Pulse


@pytest.mark.parametrize("abstract", [False, True])
def test_states_arrive_as_lines(tmp_path, abstract):
    name = f"@fedge-test-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        listener.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "60000000"})
        assert notifier.watchdog == 60.0
        notifier.tell(READY=1, STATUS="two\nlines")
        assert listener.recv(200) == b"READY=1\nSTATUS=two lines"


@pytest.mark.parametrize("given", [{}, {"NOTIFY_SOCKET": "/nowhere/at/all"}, {"NOTIFY_SOCKET": "vsock:1:2"}])
def test_without_systemd_nothing_is_said(given):
    notifier = Notifier(given | {"WATCHDOG_USEC": "soon"})
    assert notifier.watchdog is None
    notifier.tell(READY=1)


def test_a_pulse_that_does_not_beat_is_silent_while_there_is_work():
    pulse = Pulse()
    assert pulse.silent() == 0.0
    with pulse.busy():
        pulse._last -= 100
        assert pulse.silent() >= 100
        assert not pulse.beat(threading.Event())
        assert pulse.silent() < 50
    pulse._last -= 100
    assert pulse.silent() == 0.0


def test_a_paused_worker_waits_until_it_may_go_on_or_has_to_stop():
    pulse, stop = Pulse(), threading.Event()
    pulse.pause(True)
    answers = []
    worker = threading.Thread(target=lambda: answers.append(pulse.beat(stop, 0.01)))
    worker.start()
    assert answers == []
    pulse.pause(False)
    worker.join(10)
    assert answers == [False]
    pulse.pause(True)
    stop.set()
    assert pulse.beat(stop, 0.01)

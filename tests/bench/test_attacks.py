"""The benchmark of attacks: what it writes, and that it sees an attack that gets through."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from broker_server.broker import find_mosquitto
from tests.attacks import floods, gate, speech
from tests.brokers import secured

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
SCRIPT = Path(__file__).with_name("attacks.py")


def test_every_quick_attack_is_refused_and_says_by_whom(tmp_path):
    path = tmp_path / "attacks.json"
    done = subprocess.run([sys.executable, SCRIPT, "--quick", "-o", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    attacks = json.loads(path.read_text())["attacks"]
    assert len({one["attack"] for one in attacks}) == len(attacks) >= 7
    for one in attacks:
        assert set(one) == {"attack", "refused", "where", "evidence"}
        assert one["refused"] is True
        assert len(one["evidence"]) > 20
    assert {one["where"] for one in attacks} == {"broker: mosquitto", "server"}


def test_without_signatures_what_is_said_in_anothers_name_gets_through(tmp_path):
    with speech.scene(tmp_path, signed=False) as scene:
        outcome = speech.in_another_name(scene)
    assert not outcome.refused
    assert "it was taken for the device's" in outcome.evidence


def test_without_access_rules_what_is_written_for_another_gets_through(tmp_path):
    with secured("mosquitto", tmp_path, ("pi-7", "pi-8")) as broker:
        device = broker.certificates.device("pi-7")
        assert gate.writing_for_another(broker, device).refused
        configuration = broker.path.read_text()
        broker.stop()
        broker.path.write_text("".join(line + "\n" for line in configuration.splitlines() if "acl_file" not in line))
        broker.start()
        outcome = gate.writing_for_another(broker, device)
        assert not outcome.refused
        assert "up/pi-8/msg" in outcome.evidence
        broker.path.write_text(configuration)


def test_a_flood_keeps_no_round_of_the_others_from_its_end(tmp_path):
    outcome, measured = floods.ten_thousand_a_second(tmp_path, seconds=3.0)
    assert outcome.refused, outcome.evidence
    assert measured["flood"]["sent"] > 10_000
    acl = (tmp_path / "broker" / "acl").read_text()
    assert "user liar\ntopic deny fedge/toys/up/liar/#" in acl

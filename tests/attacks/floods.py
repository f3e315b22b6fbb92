"""Attacks on everybody's time: a device that says ten thousand things a second, and one that never ends its upload."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edge_client.address import Address
from edge_client.trust.speech import identity_voice
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from tests.attacks.outcome import Outcome
from tests.attacks.puppet import Puppet
from tests.federation import NAME, ROOT, Joining, Running, Serving, all_enrolled, federation
from tests.toy import toy_bundle

HONEST = ("pi-1", "pi-2", "pi-3")
DEADLINE = 60.0
"""Seconds that a round may take."""
RATE = 10_000.0
TURN = 1.0
"""Seconds after which a device that uploads makes way."""


def ten_thousand_a_second(folder: Path, seconds: float = 20.0) -> tuple[Outcome, dict[str, Any]]:
    """Let three devices play rounds while a fourth floods, and for as long again; and what was measured."""
    more = f"deadline = {DEADLINE}\n"
    with ExitStack() as stack:
        authority, url = stack.enter_context(federation(folder, rounds=100_000, cohort=len(HONEST), more=more))
        devices = all_enrolled(authority, folder, *HONEST, "liar")
        voice, _ = identity_voice(devices["liar"], folder / "liar", time.time())
        said = voice.say(m.Hello(1, b"boot0000", bytes(32), 0, bytes(32), 10, True), 1)
        server = stack.enter_context(Serving(folder))
        for name in HONEST:
            stack.enter_context(Joining(folder, url, name))
        while f"{len(HONEST)} clients" not in server.until("round "):
            pass
        before = _rounds(server, min(seconds, 5.0))
        flooder = _flooder(devices["liar"].folder, Address.parse(url).port, said, seconds)
        during = _rounds(server, seconds)
        sent = json.loads(flooder.communicate()[0])
        after = _rounds(server, seconds)
        # One that is under way has to come to its end too.
        late = server.heard("round ", DEADLINE)
        muted = next((line for line in server.lines if "liar is not listened to" in line), "nobody was muted")
    kept = [*during, *after] + ([late] if late else [])
    whole = [line for line in kept if f"{len(HONEST)} clients" in line]
    measured = {
        "deadline_s": DEADLINE,
        "flood": sent,
        "round_seconds_before": [_seconds(line) for line in before],
        "round_seconds_during": [_seconds(line) for line in during],
        "round_seconds_after": [_seconds(line) for line in after],
    }
    text = (
        f"{sent['sent'] / sent['seconds']:,.0f} messages a second for {sent['seconds']:.0f} s by a process that took "
        f"{sent['share_of_a_core']:.0%} of a core; {muted}; {len(during)} rounds meanwhile and {len(after)} in as long "
        f"after it, {len(whole)} of {len(kept)} with all {len(HONEST)} devices in time; the slowest took "
        f"{max(map(_seconds, kept), default=0.0):.1f} s of {DEADLINE:.0f} s, {max(map(_seconds, before)):.1f} s before"
    )
    refused = bool(during) and late is not None and len(whole) == len(kept) and "liar" in muted
    return Outcome("10,000 messages a second from one device", refused, "server", text), measured


def slow_loris(folder: Path) -> Outcome:
    """Announce an update, take the only place for uploads, and send one chunk of it; the other device waits for that.

    Two are asked and one update is enough: the round ends when the other device's is there, and not at its deadline.
    That update is too large to travel in its message.
    """
    attack, chunk, gate = "a slow-loris upload", 16_384, folder / "gate"
    more = f"deadline = {DEADLINE}\nclients = 2\nover_select = 2.0\n[transfer]\ninline = 0\nchunk = {chunk}\n"
    more += f'uploads = 1\nwindow = 1\nspread = 0.0\n[limits]\nturn = {TURN}\n[codec]\nkind = "none"\n'
    os.mkfifo(gate)
    with federation(folder, rounds=1, more=more, bundle=toy_bundle(hidden=1500)) as (authority, url):
        devices = all_enrolled(authority, folder, "pi-1", "loris")
        with Serving(folder) as server:
            loris = Puppet(Address.parse(url), devices["loris"], folder / "loris-state", time.time())
            with loris, Joining(folder, url, "pi-1", gate=gate):
                invitation = loris.invited()
                data = bytes(3 * chunk)
                ref = transfer.refer(data, chunk=chunk, inline=0)
                loris.say(m.Upload(invitation.epoch, invitation.task, ref))
                credit = loris.hear(m.Credit)
                topic = Topics(NAME).uploaded("loris", ref.sha256, credit.indices[0])
                loris.peer.publish(topic, transfer.piece(data, ref, credit.indices[0]))
                with gate.open("wb"):
                    gate.unlink()
                line = server.heard("round 1 ", 2 * DEADLINE)
    text = line or f"round 1 did not end within {2 * DEADLINE:.0f} s"
    # Sooner than its turn lasts, the place was not in the way.
    refused = line is not None and "1 clients" in line and TURN <= _seconds(line) < DEADLINE
    return Outcome(attack, refused, "server", f"one place for uploads, taken by who sends no more: {text}")


def _flooder(identity: Path, port: int, said: bytes, seconds: float) -> "subprocess.Popen[str]":
    topic = Topics(NAME).up("liar")
    command = [sys.executable, "-m", "tests.flood", str(identity), str(port), topic, said.hex()]
    command += ["--rate", str(RATE), "--seconds", str(seconds)]
    return subprocess.Popen(["nice", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def _rounds(server: Running, seconds: float) -> list[str]:
    """The lines of the rounds that end within a time."""
    deadline, found = time.monotonic() + seconds, []
    while (left := deadline - time.monotonic()) > 0:
        line = server.heard("round ", left)
        if line is not None:
            found.append(line)
    return found


def _seconds(line: str) -> float:
    """How long the round of a line took."""
    return next((float(part.split()[0]) for part in line.split(" · ") if part.endswith(" s")), DEADLINE)

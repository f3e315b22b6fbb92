"""One run: a server, its clients and a broker as real processes, all of them killed with SIGKILL at random moments."""

import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.bundle import Bundle
from tests.kills.account import Account, settle
from tests.mosquitto import Mosquitto
from tests.toy import toy_bundle, toy_data

ROOT = Path(__file__).parents[2]
SAMPLES = {f"c{number}": 20 + 10 * number for number in range(5)}
"""By client; no two alike, so that a weight tells whose it is."""
FEATURES, HIDDEN = 64, 64
_ROUND = re.compile(r"round ([0-9]+) · ")
_PATIENCE = 240.0


@dataclass(frozen=True)
class Kill:
    """One process dies: so long after this round, and is started again so many seconds later."""

    after: int
    seconds: float
    victim: str
    down: float
    persistence: bool
    """Of a broker: whether its next life has what it has saved."""

    def __str__(self) -> str:
        memory = f", persistence {'on' if self.persistence else 'off'}" if self.victim == "broker" else ""
        return f"{self.victim} {self.seconds:.2f} s after round {self.after}, down for {self.down:.2f} s{memory}"


def draw(seed: int, rounds: int, kills: int, brokers: int) -> list[Kill]:
    """``kills`` of the server (every third) and of clients, and ``brokers`` of the broker, in their order."""
    rng = random.Random(f"{seed}/kills")
    servers = -(-kills // 3)
    victims = ["server"] * servers + [rng.choice(list(SAMPLES)) for _ in range(kills - servers)] + ["broker"] * brokers
    rng.shuffle(victims)
    # Before the last rounds: whoever dies after them was no use any more.
    found = [
        Kill(rng.randrange(rounds * 4 // 5), rng.uniform(0, 0.4), victim, rng.uniform(0, 0.5), rng.random() < 0.5)
        for victim in victims
    ]
    return sorted(found, key=lambda kill: kill.after)


class Life:
    """A ``fedge`` process; its lines go to ``hear`` and into a log."""

    def __init__(self, log: Path, arguments: list[object], hear: Callable[[str], None], **environment: str) -> None:
        self._log = log.open("a", encoding="utf-8")
        self._hear = hear
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_client.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)} | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._log.write(line)
            self._hear(line)

    def kill(self) -> bool:
        """SIGKILL; whether it was alive until then."""
        alive = self.process.poll() is None
        self.process.kill()
        self._end()
        return alive

    def ends(self, patience: float) -> int:
        """Its exit status.

        Raises:
            AssertionError: it does not end; with the last that it said.
        """
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            said = "\n".join(Path(self._log.name).read_text(encoding="utf-8").splitlines()[-15:])
            raise AssertionError(f"{self._log.name}: it does not end after {patience:g} s:\n{said}") from None
        self._end()
        return status

    def _end(self) -> None:
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


class Run:
    """Processes of one run and the files that they leave in ``folder``."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        folder.mkdir(parents=True, exist_ok=True)
        self.bundle = toy_bundle(features=FEATURES, hidden=HIDDEN)
        (folder / "toy.fedge").write_bytes(self.bundle)
        for number, (client, samples) in enumerate(SAMPLES.items()):
            np.savez(folder / f"{client}.npz", **toy_data(samples, seed=number, features=FEATURES))
        self.broker = Mosquitto(folder / "broker")
        self.file = folder / "federation.toml"
        self.file.write_text(f"""
            [federation]
            name = "kills"
            bundle = "toy.fedge"
            [broker]
            url = "{self.broker.url}"
            [round]
            cohort = 3
            over_select = 1.3
            minimum = 2
            deadline = 4.0
            [transfer]
            inline = 0
            chunk = 1024
            spread = 0.2
            [evaluation]
            every = 5
            clients = 2
            deadline = 2.0
            [stop]
            rounds = {rounds}
            """)
        self.lives: dict[str, Life] = {}
        self._news = threading.Condition()
        self._done = 0

    def start(self, name: str, *, persistence: bool = True) -> None:
        """Begin a life of the server, of a client or of the broker."""
        if name == "broker":
            self.broker.start(persistence=persistence)
        elif name == "server":
            self.lives[name] = Life(self.folder / "server.log", ["serve", self.file], self._hear)
        else:
            environment = {
                "FEDGE_JOURNAL": str(self.folder / "journals" / name),
                "FEDGE_JOURNAL_DATA": str(self.folder / f"{name}.npz"),
            }
            arguments = ["join", f"{self.broker.url}/kills", "--id", name, "--data", "tests.kills.journal:data"]
            arguments += ["--state", self.folder / "devices" / name, "--once"]
            self.lives[name] = Life(self.folder / f"{name}.log", arguments, lambda _: None, **environment)

    def kill(self, kill: Kill) -> bool:
        """Carry one out once its time has come; whether its victim was alive."""
        with self._news:
            came = self._news.wait_for(lambda: self._done >= kill.after, _PATIENCE)
        assert came, f"round {kill.after} is not done after {_PATIENCE:g} s; see {self.folder}"
        time.sleep(kill.seconds)  # a moment of the dice, and nothing is waited for
        if kill.victim == "broker":
            self.broker.kill()
            alive = True
        else:
            alive = self.lives[kill.victim].kill()
        time.sleep(kill.down)
        self.start(kill.victim, persistence=kill.persistence)
        return alive

    def account(self) -> Account:
        """What came of it."""
        journals = {client: self.folder / "journals" / client for client in SAMPLES}
        ledger = self.folder / "state" / "ledger.db"
        return settle(Bundle.from_bytes(self.bundle), ledger, journals, SAMPLES)

    def close(self) -> None:
        """Leave no process behind."""
        for life in self.lives.values():
            if life.process.poll() is None:
                life.kill()
        self.broker.kill()

    def _hear(self, line: str) -> None:
        if found := _ROUND.match(line):
            with self._news:
                self._done = max(self._done, int(found[1]))
                self._news.notify_all()


@dataclass
class Result:
    """What a run came to."""

    account: Account
    kills: Counter[str]
    """Of processes that lived until then, by kind."""
    seconds: float


def carry_out(
    folder: Path, seed: int, rounds: int, kills: int, brokers: int, *, log: Callable[[str], None] = print
) -> Result:
    """A whole run, from the first hello to the account."""
    struck: Counter[str] = Counter()
    began = time.monotonic()
    with closing(Run(folder, rounds)) as run:
        for name in ("broker", "server", *SAMPLES):
            run.start(name)
        for number, kill in enumerate(draw(seed, rounds, kills, brokers), 1):
            alive = run.kill(kill)
            kind = "client" if kill.victim in SAMPLES else kill.victim
            struck[kind] += alive
            log(f"{time.monotonic() - began:6.1f} s: kill {number}: {kill}{'' if alive else '; it had ended'}")
        for name in ("server", *SAMPLES):
            status = run.lives[name].ends(_PATIENCE)
            assert status == 0, f"{name} ends with status {status}; see {folder}"
        seconds = time.monotonic() - began
        return Result(run.account(), struck, seconds)

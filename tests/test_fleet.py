"""A fleet and its operator: real devices, root's program beside each, a server, and the command line."""

import asyncio
import contextlib
import json
import os
import sqlite3
import time
from contextlib import closing

import msgspec
import pytest
from click.testing import CliRunner

from broker_server import fleet_cli
from broker_server.authority import Authority
from broker_server.config import load
from broker_server.fleet import FleetCare
from broker_server.inventory import Inventory
from broker_server.ledger import Ledger
from broker_server.server import Server
from edge_client.device import Workshop
from edge_client.errors import FedgeError
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.trust.keys import SigningKey
from edge_client.trust.release import seal
from tests.deploy.update.bench import BROKEN, wheel
from tests.office import Office
from tests.rooted import DEAF, Pi
from tests.toy import toy_bundle

TOML = """\
[federation]
name = "toys"
bundle = "toy.fedge"
state = "server"
[trust]
authority = "authority"
[round]
cohort = 2
[transfer]
chunk = 1024
spread = 0.0
[evaluation]
every = 0
[stop]
rounds = 1000000
"""


@pytest.fixture(autouse=True)
def the_disk_is_not_waited_for(monkeypatch):
    """Power cuts are other tests' concern."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "sync", lambda: None)


class Site:
    """A federation's folder, its server and its devices."""

    def __init__(self, folder):
        self.folder, self.hub, self.workshop, self.lines = folder, MemoryBroker(), Workshop(1), []
        (folder / "toy.fedge").write_bytes(toy_bundle(hidden=4))
        (folder / "federation.toml").write_text(TOML)
        Office(folder / "authority").registry.close()
        self.authority = Authority.load(folder / "authority")
        self.pis = []
        self.server = None

    async def serve(self):
        settings = load(self.folder / "federation.toml")
        care = FleetCare(self.folder / "server", self.lines.append, time.time, watch=0.02)
        self.server = Server(settings, self.lines.append, MemoryLink(self.hub), fleet=care)
        self.running = asyncio.ensure_future(self.server.run())
        while not care._open and not self.running.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def stop(self):
        self.server.stop("enough")
        await self.running

    async def boot(self, *clients):
        made = [Pi(self.folder / "pis", client, self.hub, self.workshop, self.authority) for client in clients]
        self.pis += made
        for pi in made:
            await pi.start()

    async def fedge(self, *arguments):
        """`fedge fleet`, which waits for the disk as others do."""

        def run():
            command = [str(self.folder / "federation.toml"), *map(str, arguments)]
            done = CliRunner().invoke(fleet_cli.fleet, command)
            if isinstance(done.exception, FedgeError):
                return str(done.exception)
            assert done.exit_code == 0, done.output + repr(done.exception)
            return done.output

        return await asyncio.to_thread(run)

    async def fleet(self):
        """What the operator is told, by device."""
        said = json.loads(await self.fedge("--json"))
        return {row["client"]: row for row in said["devices"]}, said["rollout"]

    @property
    def rounds(self):
        with Ledger.read(self.folder / "server" / "ledger.db") as ledger:
            return len(ledger.rounds())

    async def until_rounds(self, count):
        while self.rounds < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def updates(self, client, since):
        """How often a client's updates are in the rounds after one."""
        with closing(sqlite3.connect(self.folder / "server" / "ledger.db")) as ledger:
            query = "SELECT count(*) FROM updates NATURAL JOIN tasks WHERE client = ? AND round > ?"
            return ledger.execute(query, (client, since)).fetchone()[0]

    async def known(self, count):
        """Until so many devices are in the list. What they say is written in groups; here at once."""
        while len((await self.fleet())[0]) < count:
            await self.server.fleet._write()
            await asyncio.sleep(0.01)

    async def until(self, words):
        """Until the server says something, anywhere among its lines."""
        try:
            async with asyncio.timeout(20):
                while not any(words in line for line in self.lines):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            devices = [(pi.client, pi.lives, pi.lines, pi.report, pi._life, pi._root) for pi in self.pis]
            pytest.fail(f"{words!r} was not said: {self.lines}, {devices}")


@contextlib.asynccontextmanager
async def site(tmp_path):
    made = Site(tmp_path)
    async with asyncio.timeout(60):
        await made.serve()
        try:
            yield made
        finally:
            for pi in made.pis:
                await pi.stop()
            if not made.running.done():
                await made.stop()
            made.workshop.close()


def test_what_pauses_is_not_asked_also_after_a_restart_and_what_is_retired_never_again(tmp_path):
    async def play():
        async with site(tmp_path) as here:
            assert "every device pauses" in await here.fedge("pause", "--all")
            await here.boot("a", "b", "c")
            await here.known(3)
            assert here.rounds == 0
            assert "no such devices" in await here.fedge("pause", "nobody")
            assert "every device pauses" in await here.fedge("resume", "a")
            await here.fedge("resume", "--all")
            await here.fedge("pause", "c")
            await here.until_rounds(3)
            await here.stop()
            await here.serve()
            before = here.rounds
            await here.until_rounds(before + 3)
            # Whom it asks after it was told to pause: nobody, but who had a task already.
            assert here.updates("c", since=before) == 0
            assert here.updates("a", since=before) > 0
            devices, _ = await here.fleet()
            assert (devices["c"]["state"], devices["a"]["state"]) == ("paused", "ready")
            assert devices["a"]["model_version"] > 0
            assert devices["a"]["samples"] == 40
            assert devices["a"]["disk"] > 0
            assert devices["a"]["client_version"] == "0.1.0"

            assert "b is retired" in await here.fedge("retire", "b")
            await here.until_rounds(here.rounds + 1)
            before = here.rounds
            await here.fedge("resume", "c")
            await here.until_rounds(before + 3)
            assert here.updates("b", since=before + 1) == 0
            assert here.updates("c", since=before + 1) > 0
            assert (await here.fleet())[0]["b"]["state"] == "retired"
            assert "no device of this fleet" in await here.fedge("retire", "nobody")

    asyncio.run(play())


def test_a_release_reaches_the_fleet_in_waves_and_a_bad_one_stops_at_the_first(tmp_path):
    async def play():
        async with site(tmp_path) as here:
            await here.fedge("pause", "--all")
            await here.boot("a", "b", "c", "d")
            await here.known(4)
            wheel(tmp_path / "good", "0.2.0")
            assert "1 wheels" in await here.fedge("update", tmp_path / "good", "--waves", "1,50%,100%")
            await here.until("release 0.2.0: done")
            assert [pi.runs for pi in here.pis] == ["0.2.0"] * 4
            assert [pi.lives for pi in here.pis] == [["0.1.0", "0.2.0"]] * 4
            said = [line for line in here.lines if "wave" in line or "is asked" in line]
            kinds = ["wave" if "wave" in line else "asked" for line in said]
            assert kinds == ["asked", "wave", "asked", "wave", "asked", "asked"], said
            devices, rollout = await here.fleet()
            assert {row["state"] for row in devices.values()} == {"paused"}
            assert rollout["state"] == "done"

            # It starts, and does not hear the server: the device goes back by itself, and nobody else is asked.
            wheel(tmp_path / "deaf", "0.3.0", code=DEAF)
            await here.fedge("update", tmp_path / "deaf")
            await here.until("release 0.3.0: stopped: 1 of 1 in wave 1 failed: the new client has not heard the server")
            assert [pi.runs for pi in here.pis] == ["0.2.0"] * 4
            assert sorted(len(pi.lives) for pi in here.pis) == [2, 2, 2, 4]
            (hurt,) = [pi for pi in here.pis if len(pi.lives) == 4]
            assert hurt.lives == ["0.1.0", "0.2.0", "0.3.0", "0.2.0"]

            # It cannot even be imported: it never becomes the client.
            wheel(tmp_path / "broken", "0.3.1", code=BROKEN)
            await here.fedge("update", tmp_path / "broken")
            await here.until("release 0.3.1: stopped: 1 of 1 in wave 1 failed: the new client does not start")
            assert [pi.runs for pi in here.pis] == ["0.2.0"] * 4
            assert sorted(len(pi.lives) for pi in here.pis) == [2, 2, 2, 4]
            shown = await here.fedge()
            assert "release 0.3.1: stopped (1 of 1 in wave 1 failed" in shown

    asyncio.run(play())


def test_a_server_that_is_started_anew_goes_on_with_a_rollout_and_what_was_tampered_with_is_refused(tmp_path):
    async def play():
        async with site(tmp_path) as here:
            await here.fedge("pause", "--all")
            await here.boot("a", "b")
            await here.known(2)
            wheel(tmp_path / "good", "0.2.0")
            await here.fedge("update", tmp_path / "good", "--waves", "1,100%")
            await here.until("is asked")
            await here.stop()
            await here.serve()
            await here.until("release 0.2.0: done")
            assert [pi.lives for pi in here.pis] == [["0.1.0", "0.2.0"]] * 2
            # Nobody twice; whom the server asked last it may not have said any more.
            asked = [line for line in here.lines if "is asked" in line]
            assert len(asked) == len(set(asked))

            # Whoever has the server and not the key: the devices believe none of it.
            await here.stop()
            with Inventory.open(tmp_path / "server") as inventory:
                _, rollout = inventory.latest()
                changed = msgspec.structs.replace(rollout.record, version="6.6.6", issued=time.time())
                said = msgspec.structs.replace(rollout, version="6.6.6", wave=0, state="running")
                forged = seal(changed, SigningKey.generate().sign)
                inventory.begin(msgspec.structs.replace(said, release=forged), 1.0)
            await here.serve()
            await here.until("release 6.6.6: stopped: 1 of 1 in wave 1 failed: the signature of the release is not the")
            assert [pi.runs for pi in here.pis] == ["0.2.0"] * 2
            assert [pi.report["version"] for pi in here.pis] == ["0.2.0"] * 2  # root has not even seen it

            # Nor of what was signed once and is over.
            await here.stop()
            with Inventory.open(tmp_path / "server") as inventory:
                old = msgspec.structs.replace(rollout.record, version="0.1.5", issued=1.0, expires=2.0)
                said = msgspec.structs.replace(rollout, version="0.1.5", release=seal(old, here.authority.signing.sign))
                inventory.begin(msgspec.structs.replace(said, wave=0, state="running"), 1.0)
            await here.serve()
            await here.until("release 0.1.5: stopped: 1 of 1 in wave 1 failed: the release expired")
            assert [pi.runs for pi in here.pis] == ["0.2.0"] * 2

    asyncio.run(play())

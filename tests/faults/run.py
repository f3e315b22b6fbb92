"""One run: a plan carried out, and what came of it."""

import asyncio
import itertools
import os
import tempfile
from collections import Counter
from contextlib import ExitStack, chdir
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import msgspec

from broker_server.config import Federation
from edge_client.bundle import Bundle
from tests.faults.broker import Air
from tests.faults.clients import ClientNode
from tests.faults.disk import Disks
from tests.faults.invariants import Oracle
from tests.faults.nodes import ServerNode, Site
from tests.faults.plans import Fault, Plan
from tests.faults.strangers import Stranger
from tests.faults.tampering import TamperingBroker
from tests.faults.training import Data, Held
from tests.faults.world import Violation, WallClock, World
from tests.toy import toy_bundle

NAME = "sim"


@dataclass
class Result:
    """What a run came to."""

    plan: Plan
    rounds: int
    faults: Counter[str]
    lost: int
    doubled: int
    digest: int
    seconds: float
    """Virtual."""
    violation: BaseException | None
    trace: list[str] = field(default_factory=list)


@cache
def _bundle(hidden: int, buffers: bool, control: bool) -> bytes:
    return toy_bundle(features=8 if hidden > 8 else 4, hidden=hidden, buffer=buffers, control=control)


def run(plan: Plan, *, trace: bool = False, signed: bool = False, tampering: float = 0.0) -> Result:
    """Carry out a plan; every violation of an invariant, and every unexpected error, is the result's.

    The nodes sign what they say, or do not; the broker tampers with a share of it.
    """
    # Memory where there is some: a run writes many small files.
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    # From within its folder: a path that is new each time would be in messages, and make each run another one.
    with tempfile.TemporaryDirectory(prefix="fedge-sim-", dir=shared) as folder, chdir(folder):
        return Run(plan, Path(), trace=trace, signed=signed, tampering=tampering).go()


class Run:
    """A plan under way."""

    def __init__(self, plan: Plan, folder: Path, *, trace: bool, signed: bool = False, tampering: float = 0.0) -> None:
        self.plan, self.folder = plan, folder
        data = _bundle(plan.hidden, plan.buffers, plan.algorithm == "scaffold")
        (folder / "toy.fedge").write_bytes(data)
        bundle = Bundle.from_bytes(data)
        self.settings = settings = _settings(plan, folder)
        self.world = world = World(plan.seed, trace)
        places = {f"c{number}": Data(5 + 7 * number % 60, number) for number in range(plan.clients)}
        oracle = Oracle(world, settings, bundle, {name: place.samples for name, place in places.items()})
        broker = TamperingBroker(world, plan.queue, share=tampering, until=plan.quiet)
        self.site = Site(world, broker, Disks(), oracle, settings, bundle, folder, signed, plan.disk_faults)
        self.clients = {
            name: ClientNode(self.site, name, place, plan.training, chunked=not plan.inline)
            for name, place in places.items()
        }
        self.strangers = [Stranger(self.site, f"x{number}", 5.0) for number in range(plan.strangers)]
        self.folders = (folder / f"state{number}" for number in itertools.count())
        self.server = ServerNode(self.site, next(self.folders))

    def go(self) -> Result:
        """Run to the end."""
        world, plan = self.world, self.plan
        with ExitStack() as stack:
            stack.enter_context(self.site.disks.installed())
            clock = WallClock(world)
            for name in ("broker_server.ledger", "broker_server.worker", "broker_server.server", "edge_client.device"):
                stack.enter_context(mock.patch(f"{name}.time", clock))
            # Anchors move on within the few rounds of a run.
            stack.enter_context(mock.patch("broker_server.coding._AGE", 2))
            stack.enter_context(mock.patch("broker_server.worker.HeldOut", Held))
            stack.enter_context(mock.patch("broker_server.worker.write_artifacts", return_value=None))
            try:
                world.spawn(self.server.supervise())
                for client in self.clients.values():
                    world.spawn(client.supervise())
                for stranger in self.strangers:
                    world.spawn(stranger.live())
                for fault in plan.faults:
                    world.loop.call_at(fault.at, self._strike, fault)
                world.spawn(self._watch())
                world.run(lambda: self.server.outcome is not None)
                if world.violation is None:
                    self.site.oracle.finished(plan.rounds, str(self.server.folder), self.site.broker)
            except Violation as violation:
                world.fail(violation)
            finally:
                for node in (*self.clients.values(), self.server):
                    node.retired = True
                world.close()
        oracle = self.site.oracle
        return Result(
            plan,
            oracle.rounds,
            world.faults,
            oracle.lost,
            oracle.doubled,
            world.digest,
            world.now,
            world.violation,
            world.trace,
        )

    async def _watch(self) -> None:
        """Check what no single step shows: bounds, and that rounds go on once nothing goes wrong any more."""
        world, oracle, plan = self.world, self.site.oracle, self.plan
        since, rounds = 0.0, -1
        copies = 1 + sum(fault.kind in ("duplication", "replay") for fault in plan.faults)
        while self.server.outcome is None:
            await asyncio.sleep(5.0)
            oracle.bounded(self.site.broker, len(self.clients) + len(self.strangers), copies)
            if world.now < plan.quiet:
                since = world.now
                continue
            if oracle.rounds != rounds:
                since, rounds = world.now, oracle.rounds
            if world.now - max(since, plan.quiet) > plan.patience:
                world.violated(f"no round was finished for {plan.patience:.0f} s, and nothing went wrong in that time")

    # Faults.

    def _strike(self, fault: Fault) -> None:
        world, site, who = self.world, self.site, fault.who
        names = [who] if who != "everyone" else [*self.clients, "server"]
        node = self.server if who == "server" else self.clients.get(who)
        match fault.kind:
            case "loss":
                self._air(names, fault, "loss", 0.6 * fault.strength)
            case "duplication":
                self._air(names, fault, "double", 0.6 * fault.strength)
            case "reordering":
                self._air(names, fault, "reorder", 0.6 * fault.strength)
            case "delay":
                world.strike("delay", who)
                self._air(names, fault, "latency", (0.1, 10.0 * fault.strength + 0.2))
            case "slow link":
                world.strike("slow link", who)
                self._air(names, fault, "bandwidth", 200 + 5000 * fault.strength)
            case "partition":
                world.strike("partition", who)
                for name in names:
                    site.broker.cut(name, fault.seconds)
            case "broken connection":
                world.strike("broken connection", who)
                for name in names:
                    site.broker.break_off(name)
            case "broker restart" | "broker amnesia":
                world.strike(fault.kind, "broker")
                site.broker.stop(forget=fault.kind == "broker amnesia")
                world.later(fault.seconds, site.broker.start)
            case "client kill" | "client power cut" | "server kill" | "server power cut":
                assert node is not None
                node.crash_at(fault.number, power=fault.kind.endswith("cut"), down=fault.seconds)
            case "full disk":
                assert node is not None
                node.medium.failing = 0.5 * fault.strength
                world.later(fault.seconds, setattr, node.medium, "failing", 0.0)
            case "ambiguous commit":
                self.server.medium.ambiguous = 0.3 * fault.strength
                world.later(fault.seconds, setattr, self.server.medium, "ambiguous", 0.0)
            case "clock jump":
                world.strike("clock jump", "wall")
                world.wall_offset += (fault.strength - 0.4) * 1e6
            case "card lost":
                self.clients[who].lose_card()
            case "unavailable":
                world.strike("unavailable", who)
                self._available(who, available=False)
                world.later(fault.seconds, self._available, who, True)
            case "client leaves":
                world.strike("client leaves", who)
                world.spawn(self.clients[who].leave())
            case "second server":
                self.server.second()
            case "new state folder":
                self._replace_server(fault)
            case "garbage":
                world.strike("hostile message", who)
                topic = self.world.rng.choice([f"fedge/{NAME}/up/{who}/msg", f"fedge/{NAME}/down/{who}/msg"])
                site.broker.route(topic, world.rng.randbytes(fault.number * 3))
            case "replay":
                start = int(fault.strength * len(site.broker.history))
                for topic, payload in site.broker.history[start : start + 3 * fault.number]:
                    world.strike("replay", "broker")
                    site.broker.route(topic, payload)
            case _:
                raise AssertionError(fault.kind)

    def _air(self, names: list[str], fault: Fault, what: str, value: object) -> None:
        for name in names:
            air = self.site.broker.air_of(name)
            setattr(air, what, value)
            self.world.later(fault.seconds, setattr, air, what, getattr(Air(), what))

    def _available(self, who: str, available: bool) -> None:
        client = self.clients[who]
        if client.alive and client.device is not None:
            client.device.available(available)

    def _replace_server(self, fault: Fault) -> None:
        """Someone starts a new server on an empty folder while the old one still runs; the old one ends later."""
        world, old = self.world, self.server
        epochs = [view.epoch for view in self.site.oracle.ledgers]
        if old.outcome is not None or not all(epochs) or world.wall() < max(epochs) + 2:
            return  # a clock that runs behind the old epochs makes a server that refuses, and no client would follow it
        world.strike("new state folder", "server")
        self.server = new = ServerNode(self.site, next(self.folders))
        world.spawn(new.supervise())

        def end() -> None:
            if new.retired and self.server is new:
                # The clock went back before it began: it has refused, and its operator keeps the old one.
                self.server = old
                return
            old.retired = True
            old.power = False
            old.crash("retired")

        world.later(fault.seconds, end)


def _rounds(plan: Plan) -> dict[str, object]:
    common = {"clients": plan.quorum, "deadline": plan.deadline}
    if (buffered := plan.buffered) is None:
        return common | {"cohort": plan.cohort, "over_select": plan.over_select, "minimum": plan.minimum}
    return common | {
        "mode": "buffered",
        "concurrency": buffered.concurrency,
        "buffer": buffered.buffer,
        "staleness": buffered.staleness,
        "max_staleness": buffered.most,
    }


def _settings(plan: Plan, folder: Path) -> Federation:
    data = {
        "federation": {"name": NAME, "bundle": str(folder / "toy.fedge"), "state": "", "seed": plan.seed % 1000},
        "round": _rounds(plan),
        "train": {"epochs": 1},
        "codec": {"kind": plan.kind, "feedback": plan.feedback},
        "aggregation": {
            "weights": plan.weights,
            "algorithm": plan.algorithm,
            "options": {"clients": plan.clients} if plan.algorithm == "scaffold" else {},
        },
        "server": {"options": {"momentum": plan.momentum}},
        "evaluation": {
            "every": plan.every,
            "clients": plan.evaluators,
            "data": "held out" if plan.server_data else "",
            "deadline": plan.deadline,
        },
        "transfer": {
            "inline": plan.inline,
            "chunk": 1024,
            "window": plan.window,
            "uploads": plan.uploads,
            "spread": 1.0,
        },
        "stop": {"rounds": plan.rounds},
    }
    return msgspec.convert(data, Federation)

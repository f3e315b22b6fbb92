"""Fault plans: what a run is, and everything that will go wrong in it, drawn from one seed before it begins.

A plan is data. Each fault stands alone, so that a failing plan can be run again without some of them: see `shrink`.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

Size = Literal["small", "mixed"]

KINDS = (
    "loss",
    "duplication",
    "reordering",
    "delay",
    "slow link",
    "partition",
    "broken connection",
    "broker restart",
    "broker amnesia",
    "client kill",
    "client power cut",
    "server kill",
    "server power cut",
    "full disk",
    "ambiguous commit",
    "clock jump",
    "card lost",
    "unavailable",
    "client leaves",
    "second server",
    "new state folder",
    "garbage",
    "replay",
)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong: when (seconds), what, to whom, for how long, how badly (``strength``, 0 to 1)."""

    at: float
    kind: str
    who: str
    seconds: float
    strength: float
    number: int
    """For crashes the boundary, counted from ``at``, at which the node dies."""


@dataclass(frozen=True)
class Buffered:
    """A federation without rounds."""

    concurrency: int
    buffer: int
    staleness: float
    most: int
    """The maximum staleness."""


@dataclass(frozen=True)
class Plan:
    """A run: the federation and its faults."""

    seed: int
    clients: int
    strangers: int
    rounds: int
    cohort: int
    over_select: float
    minimum: int
    quorum: int
    """Clients that must be there before the first round; 0: as many as a cohort."""
    deadline: float
    kind: str
    feedback: str
    inline: int
    window: int
    uploads: int
    hidden: int
    buffers: bool
    weights: str
    momentum: float
    every: int
    evaluators: int
    server_data: bool
    queue: int
    """Messages that the broker keeps for one subscriber."""
    training: float
    faults: tuple[Fault, ...]
    buffered: Buffered | None = None
    """None: synchronous rounds."""
    algorithm: str = "fedavg"
    """Or ``median``, which reads all updates of a round from the ledger; or ``scaffold``, which devices remember."""

    @property
    def quiet(self) -> float:
        """When the last fault is over, seconds."""
        return max((fault.at + fault.seconds for fault in self.faults), default=0.0)

    @property
    def patience(self) -> float:
        """Virtual seconds within which a round is done once nothing goes wrong any more.

        A client may be in the longest pause of its back-off (300 s, and as much until its heartbeat), and the round
        that this costs its time is void at its deadline; then the next one must succeed.
        """
        return 2 * (self.deadline + 400.0) + 20 * self.training

    @property
    def disk_faults(self) -> bool:
        return any(fault.kind in ("full disk", "ambiguous commit") for fault in self.faults)

    def also(self, kinds: tuple[str, ...]) -> "Plan":
        """This plan with more faults of these kinds, on top of what goes wrong anyway."""
        rng = random.Random(f"{self.seed}/also")
        length = self.rounds * (2.0 + self.training)
        more = [_fault(rng, self.clients, length, kind) for kind in kinds for _ in range(4)]
        # What goes wrong from the beginning meets every first word.
        more += [replace(_fault(rng, self.clients, length, kind), at=0.0) for kind in kinds]
        return replace(self, faults=tuple(sorted((*self.faults, *more), key=lambda fault: fault.at)))

    def without(self, gone: set[int]) -> "Plan":
        """This plan without some of its faults, by their place."""
        return replace(self, faults=tuple(f for place, f in enumerate(self.faults) if place not in gone))


def draw(seed: int, size: Size = "mixed") -> Plan:
    """The plan of a seed."""
    rng = random.Random(f"{seed}/{size}/plan")
    if size == "small":
        clients, rounds = rng.randint(5, 8), rng.randint(3, 8)
    else:
        clients = rng.choice([5, 5, 6, 7, 8, 8, 10, 12, 16, 20, rng.randint(20, 60)])
        if rng.random() < 0.02:
            clients = rng.randint(60, 200)
        rounds = rng.randint(30, 90) if clients <= 20 else rng.randint(5, 20)
    cohort = rng.randint(2, min(clients, 5) if clients <= 20 else clients // 3)
    training = rng.choice([1.0, 5.0, 12.0])
    deadline = rng.choice([2.0, 5.0, 20.0]) * max(training, 4.0)
    chunked = rng.random() < 0.5
    length = rounds * (2.0 + training)
    count = rng.choice([0, 1, 2, 4, 8, 16]) if size == "small" else rng.randint(0, 60)
    weather = (_weather(rng, length) for _ in range(rng.choice([0, 0, 1, 2])))
    faults = [*weather, *(_fault(rng, clients, length) for _ in range(count))]
    plan = Plan(
        seed=seed,
        clients=clients,
        strangers=rng.choice([0, 0, 1, 2]),
        rounds=rounds,
        cohort=cohort,
        over_select=rng.choice([1.0, 1.0, 1.5]),
        minimum=rng.choice([1, cohort, rng.randint(1, cohort)]),
        quorum=rng.choice([0, 0, clients]),
        deadline=deadline,
        kind=rng.choice(["quantized", "quantized", "none"]),
        feedback=rng.choice(["residual", "residual", "residual", "length", "none"]),
        inline=0 if chunked else 16384,
        window=rng.choice([1, 2, 4, 16]),
        uploads=rng.choice([1, 2, 16]),
        hidden=rng.choice([0, 0, 8, 40]),
        buffers=rng.random() < 0.2,
        weights=rng.choice(["samples", "samples", "uniform"]),
        momentum=rng.choice([0.0, 0.0, 0.5]),
        every=rng.choice([0, 0, 1, 3]),
        evaluators=rng.choice([0, 2]),
        server_data=rng.random() < 0.5,
        queue=rng.choice([20, 100, 1000]),
        training=training,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        algorithm=_algorithm(random.Random(f"{seed}/algorithm")),
    )
    if plan.algorithm == "scaffold" and plan.kind != "none":
        plan = replace(plan, feedback="residual")
    return plan


def _algorithm(rng: random.Random) -> str:
    drawn = rng.random()
    return "median" if drawn < 0.2 else "scaffold" if drawn > 0.75 else "fedavg"


def without_rounds(plan: Plan) -> Plan:
    """The same federation under the same faults, with updates in a buffer instead of rounds."""
    rng = random.Random(f"{plan.seed}/buffered")
    buffered = Buffered(
        concurrency=rng.randint(1, plan.clients),
        buffer=rng.randint(1, plan.cohort),
        staleness=rng.choice([0.0, 0.5, 0.5, 2.0]),
        most=rng.choice([0, 1, 3, 20, 20]),
    )
    return replace(plan, buffered=buffered, algorithm="fedavg")


def either(seed: int, size: Size = "mixed") -> Plan:
    """The plan of a seed, that of every third without rounds."""
    plan = draw(seed, size)
    return plan if seed % 3 else without_rounds(plan)


def _weather(rng: random.Random, length: float) -> Fault:
    """Trouble for everyone, most of the time."""
    kind = rng.choice(["loss", "duplication", "reordering", "delay"])
    return Fault(0.0, kind, "everyone", rng.uniform(0.5, 1.5) * length, rng.uniform(0.0, 0.5), 0)


def _fault(rng: random.Random, clients: int, length: float, kind: str = "") -> Fault:
    if not kind:
        kind = rng.choice(KINDS)
        if kind == "new state folder" and rng.random() < 0.8:
            kind = "server power cut"
    someone = f"c{rng.randrange(clients)}"
    who = "server" if kind.startswith("server") or kind in ("second server", "new state folder") else someone
    if kind in ("loss", "duplication", "reordering", "delay", "slow link", "partition", "broken connection"):
        who = rng.choice(["server", "server", someone, someone, "everyone"])
    if kind in ("full disk", "ambiguous commit"):
        who = "server" if kind == "ambiguous commit" else rng.choice(["server", someone])
    seconds = rng.choice([1.0, 10.0, 40.0, 100.0]) * rng.uniform(0.5, 1.5)
    return Fault(rng.uniform(0, length), kind, who, seconds, rng.random(), rng.randint(1, 60))

"""The account after a run: the server's ledger against what the clients wrote down themselves.

The ledger says which updates were recorded, which tasks became versions, and what the last version is. The clients'
journals say which updates they made, with their bytes, and what they were told of them. What the model should be is
computed from the journals alone, in float64, with the sample counts of the data files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.ledger import Ledger
from edge_client.bundle import Bundle
from edge_client.codec.model import unpack_model
from edge_client.codec.update import decode_update
from edge_client.manifest import update_layouts
from tests.kills.journal import FILE

Identity = tuple[int, int]


@dataclass
class Account:
    """What a run came to; each entry of ``lost``, ``doubled`` and ``wrong`` is one sentence."""

    rounds: int = 0
    recorded: int = 0
    """Updates whose clients were told that they are recorded, and that count."""
    withdrawn: int = 0
    """Those that do not: the ledger itself has voided their task."""
    rejected: int = 0
    """Updates whose clients were told that they do not count: they were late, or their task is void."""
    lost: list[str] = field(default_factory=list)
    """Updates with the receipt "recorded" that are in no version."""
    doubled: list[str] = field(default_factory=list)
    """Updates that count more than once, or that count and whose clients keep them for the next one."""
    wrong: list[str] = field(default_factory=list)
    """Anything else that does not add up."""
    apart: float = 0.0
    """How far the last model is from what the counted updates add up to: the largest difference of a parameter."""

    @property
    def clean(self) -> bool:
        """Whether everything adds up."""
        return not (self.lost or self.doubled or self.wrong)


@dataclass
class Journal:
    """What one client wrote down."""

    made: dict[Identity, dict[str, bytes]] = field(default_factory=dict)
    """Updates by SHA-256; more than one where a task was trained again."""
    told: dict[Identity, list[bool]] = field(default_factory=dict)
    began: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Journal":
        """Read a journal."""
        journal = cls()
        path = folder / FILE
        for line in path.read_bytes().splitlines() if path.exists() else []:
            facts = json.loads(line)
            if facts["what"] == "began":
                journal.began.append((facts["version"], facts["sha256"]))
                continue
            identity = (facts["task"][0], facts["task"][1])
            if facts["what"] == "told":
                journal.told.setdefault(identity, []).append(facts["recorded"])
                continue
            data = (folder / facts["sha256"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == facts["sha256"]
            journal.made.setdefault(identity, {})[facts["sha256"]] = data
        return journal


def settle(bundle: Bundle, ledger: Path, journals: Mapping[str, Path], samples: Mapping[str, int]) -> Account:
    """Check a ledger against the clients' journals.

    Args:
        bundle: what was trained; the server's optimizer adds the mean as it is.
        ledger: the server's file.
        journals: folder of each client's journal.
        samples: of each client's data.
    """
    account = Account()
    kept = {client: Journal.read(folder) for client, folder in journals.items()}
    with closing(Ledger.read(ledger)) as book:
        rows = book._database.all("SELECT epoch, task, client, samples, hex(sha256) FROM updates ORDER BY id")
        tasks = book._database.all("SELECT epoch, task, round, kind, outcome FROM tasks ORDER BY epoch, task")
        results, latest, versions = book.rounds(), book.latest(), book.versions()
    assert latest is not None
    outcomes = {(epoch, task): outcome for epoch, task, _, _, outcome in tasks}
    made_of = {
        (epoch, task): number for epoch, task, number, kind, outcome in tasks if kind == "train" and outcome == "done"
    }
    account.rounds = len(results)
    _tasks(account, tasks, made_of, results, versions)
    counted = _rows(account, rows, made_of, kept, samples)
    _receipts(account, kept, {(epoch, task, client) for epoch, task, client, _, _ in rows}, outcomes)
    _begun(account, kept)
    _sums(account, bundle, counted, results, latest, samples)
    return account


def _tasks(account: Account, tasks: Any, made_of: Mapping[Identity, int], results: Any, versions: Any) -> None:
    """Each round has one task that became its version, and no task is left open."""
    for epoch, task, *_, outcome in tasks:
        if outcome is None:
            account.wrong.append(f"task {epoch}/{task} is open")
    rounds = sorted(made_of.values())
    if rounds != [one.round for one in results] or rounds != list(range(1, len(rounds) + 1)):
        account.wrong.append(f"rounds {[one.round for one in results]} are made of tasks of the rounds {rounds}")
    if [version for version, *_ in versions] != rounds or [one.version for one in results] != rounds:
        account.wrong.append(f"versions {versions} of rounds {rounds}")


def _rows(
    account: Account,
    rows: Any,
    made_of: Mapping[Identity, int],
    kept: Mapping[str, Journal],
    samples: Mapping[str, int],
) -> dict[int, list[tuple[str, bytes]]]:
    """By round, the updates that it is made of, from their clients' own journals."""
    counted: dict[int, list[tuple[str, bytes]]] = {}
    seen: Counter[str] = Counter()
    for epoch, task, client, weight, digest in rows:
        number = made_of.get((epoch, task))
        if number is None:
            continue
        seen[digest] += 1
        if seen[digest] > 1:
            account.doubled.append(f"the update of {client} for task {epoch}/{task} counts for another task too")
        data = kept[client].made.get((epoch, task), {}).get(digest.lower()) if client in kept else None
        if data is None:
            account.wrong.append(f"{client} never made the update that is recorded for task {epoch}/{task}")
            continue
        if weight != samples[client]:
            account.wrong.append(f"the update of {client} for {epoch}/{task} weighs {weight}; it has {samples[client]}")
        counted.setdefault(number, []).append((client, data))
    return counted


def _receipts(
    account: Account, kept: Mapping[str, Journal], rows: set[tuple[int, int, str]], outcomes: Mapping[Identity, Any]
) -> None:
    """What clients were told is so."""
    for client, journal in kept.items():
        for identity, words in journal.told.items():
            if identity not in journal.made:
                continue  # told of a life before, or by mistake: the store settles nothing
            counts = (*identity, client) in rows and outcomes.get(identity) == "done"
            if True in words and not counts and outcomes.get(identity) != "void":
                account.lost.append(f"{client} was told that {identity} is recorded; it is in no version")
            elif False in words and counts:
                account.doubled.append(f"{client} was told that {identity} does not count, and would send it again")
            elif True not in words:
                account.rejected += 1
            elif counts:
                account.recorded += 1
            else:
                account.withdrawn += 1


def _begun(account: Account, kept: Mapping[str, Journal]) -> None:
    """All who trained from a version had the same bits."""
    known: dict[int, str] = {}
    for client, journal in kept.items():
        for version, digest in journal.began:
            if known.setdefault(version, digest) != digest:
                account.wrong.append(f"{client} had other parameters of version {version} than others")


def _sums(
    account: Account,
    bundle: Bundle,
    counted: Mapping[int, list[tuple[str, bytes]]],
    results: Any,
    latest: Any,
    samples: Mapping[str, int],
) -> None:
    """The weights of each round, and the last model: the first one and all means, each update once.

    What rounding leaves out of a version goes into the next one, so the sum over all rounds tells of each of them.
    """
    layouts, base = update_layouts(bundle.manifest), bundle.initial()
    reached, longest = base.astype(np.float64), 0.0
    for result in results:
        updates = counted.get(result.round, [])
        weight = sum(samples[client] for client, _ in updates)
        if (result.clients, result.samples) != (len(updates), weight):
            account.wrong.append(
                f"round {result.round} says {result.clients} updates of {result.samples} samples; "
                f"the clients made {len(updates)} of {weight}"
            )
        for client, data in updates:
            delta = decode_update(data, layouts).vectors["delta"].astype(np.float64)
            reached += delta * (samples[client] / weight)
            longest = max(longest, float(np.abs(delta).max()))
    published = unpack_model(latest.state, bundle.layout).parameters(base).astype(np.float64)
    left = np.frombuffer(latest.remainder, "<f4").astype(np.float64) if latest.remainder else 0.0
    account.apart = float(np.abs(published + left - reached).max())
    if not account.apart < 1e-3 * longest:
        account.wrong.append(
            f"version {latest.version} is {account.apart:.2e} away from what its updates add up to; "
            f"the longest of them moves a parameter by {longest:.2e}"
        )

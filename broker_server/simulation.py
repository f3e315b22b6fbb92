"""A federation on one machine: broker, server, and a fleet of emulated phones in a process of its own."""

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from broker_server.config import Federation, Trust
from broker_server.connection import broker, keys, server_link
from broker_server.entrance import enter
from broker_server.findings import Findings
from broker_server.findings_table import read_findings
from broker_server.ledger import Ledger
from broker_server.records import Round
from broker_server.server import Outcome, Server, locked, read_bundle
from broker_server.worker import ledger_path
from edge_client.address import Address
from edge_client.bundle import Bundle
from edge_client.data import load_arrays
from edge_client.emulator.fleet import FleetReport, FleetSpec, peak_rss_mib
from edge_client.errors import ConfigError, FedgeError, TransportError

_LAST_WORDS = 30.0
"""Seconds that the fleet gets to end after the federation has."""


@dataclass(frozen=True)
class Simulated:
    """What a simulation came to."""

    outcome: Outcome
    rounds: list[Round]
    seconds: float
    fleet: FleetReport
    peak_rss_mib: float
    """Most memory of the server and the fleet together."""
    findings: tuple[Findings, ...] = ()
    """What the first and the newest evaluation in the ledger found, where clients counted anything."""


async def simulate(
    settings: Federation,
    log: Callable[[str], None],
    on_round: Callable[[Round], None] = lambda _: None,
    *,
    insecure: bool = False,
    fleet: str = "edge_client.emulator",
) -> Simulated:
    """Run the whole federation, to its end.

    Bytes are counted by the phones' transports, MQTT framing included. ``insecure`` as for `connection.broker`;
    ``fleet`` is the module that runs as the phones' process.

    Raises:
        ConfigError: ``[simulation]`` names no data.
        FedgeError: something that the settings name cannot be used.
    """
    if not settings.simulation.data:
        raise ConfigError("simulation.data is empty; expected an .npz file or module:function with the phones' samples")
    if settings.trust.authority and not settings.simulation.identities:
        # A file for a fleet in the field is tried out as it is; its devices' keys are not here.
        log("simulation.identities is empty: no certificates and no signatures in this run")
        settings = msgspec.structs.replace(settings, trust=Trust())
    rounds: list[Round] = []

    def finished(result: Round) -> None:
        rounds.append(result)
        on_round(result)

    started = time.monotonic()
    if not settings.round.clients and settings.simulation.availability == 1:
        # All phones first, so that who is drawn does not depend on who was quick to connect.
        everyone = msgspec.structs.replace(settings.round, clients=settings.simulation.clients)
        settings = msgspec.structs.replace(settings, round=everyone)
    await asyncio.to_thread(_check, settings)
    with locked(settings) as lock:
        settings, data = await asyncio.to_thread(_reserve, settings)
        with keys(settings) as keyring, broker(settings, log, insecure=insecure) as (address, tls):
            link = server_link(settings, address, attempts=5, tls=tls)
            fit = partial(enter, address=address, log=log, attempts=5, tls=tls, keyring=keyring)
            server = Server(settings, log, link, on_round=finished, lock=lock, fit=fit, keyring=keyring)
            serving = asyncio.ensure_future(server.run())
            phones = await _start(settings, address, data, fleet)
            told = asyncio.ensure_future(_report(phones))
            try:
                await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
                if not serving.done():
                    await told
                    server.stop("the emulated phones have ended")
                outcome = await serving
                report = await asyncio.wait_for(told, _LAST_WORDS)
            except TimeoutError as error:
                raise TransportError(f"the emulated phones did not end within {_LAST_WORDS:.0f} s") from error
            finally:
                serving.cancel()
                if phones.stdin is not None:
                    phones.stdin.close()
                if phones.returncode is None:
                    phones.terminate()
                await asyncio.gather(phones.wait(), told, serving, return_exceptions=True)
    peak = peak_rss_mib() + report.peak_rss_mib
    with Ledger.read(ledger_path(settings)) as ledger:
        found = read_findings(ledger.findings())
    return Simulated(outcome, rounds, time.monotonic() - started, report, peak, tuple(found))


def _check(settings: Federation) -> None:
    """Find a bundle that cannot be used before anything is written.

    Raises:
        BundleError: it is missing, damaged or foreign.
    """
    Bundle.from_bytes(read_bundle(settings))


def _reserve(settings: Federation) -> tuple[Federation, str]:
    """Keep ``simulation.test_fraction`` of the samples for the server's evaluation, where it has no data of its own."""
    simulation, evaluation = settings.simulation, settings.evaluation
    if not simulation.test_fraction or evaluation.data:
        return settings, simulation.data
    arrays = load_arrays(simulation.data)
    count = len(next(iter(arrays.values())))
    order = np.random.default_rng(settings.federation.seed).permutation(count)
    cut = max(1, round(count * simulation.test_fraction))
    folder = Path(settings.federation.state) / "simulation"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"test": order[:cut], "train": order[cut:]}
    for name, rows in paths.items():
        chosen: dict[str, Any] = {key: array[np.sort(rows)] for key, array in arrays.items()}
        np.savez(folder / f"{name}.npz", **chosen)
    held_out = msgspec.structs.replace(evaluation, data=str(folder / "test.npz"))
    return msgspec.structs.replace(settings, evaluation=held_out), str(folder / "train.npz")


async def _start(settings: Federation, address: Address, data: str, module: str) -> asyncio.subprocess.Process:
    simulation, state = settings.simulation, Path(settings.federation.state)
    spec = FleetSpec(
        url="",
        federation=settings.federation.name,
        state=str(state / "phones"),
        data=data,
        clients=simulation.clients,
        split=simulation.split,
        alpha=simulation.alpha,
        shards=simulation.shards,
        key=simulation.key,
        label=simulation.label,
        holdout=simulation.holdout,
        share=simulation.share,
        seed=settings.federation.seed,
        slots=simulation.slots,
        speed=simulation.speed,
        bandwidth=simulation.bandwidth,
        latency=simulation.latency,
        availability=simulation.availability,
        dropout=simulation.dropout,
        identities=simulation.identities,
    )
    path = await asyncio.to_thread(_write, state / "fleet.json", msgspec.json.encode(spec))
    fleet = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        str(path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert fleet.stdin is not None
    # Through the pipe and not the file: it may hold a password.
    fleet.stdin.write(f"{address.url}\n".encode())
    return fleet


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


async def _report(fleet: asyncio.subprocess.Process) -> FleetReport:
    """The fleet's last line.

    Raises:
        FedgeError: the fleet failed; the message is its own.
    """
    assert fleet.stdout is not None and fleet.stderr is not None  # noqa: PT018
    out, errors = await asyncio.gather(fleet.stdout.read(), fleet.stderr.read())
    await fleet.wait()
    if fleet.returncode != 0:
        words = errors.decode(errors="replace").strip().splitlines() or ["no word"]
        raise FedgeError(f"emulated phones: {words[-1].removeprefix('fedge: ')}")
    return msgspec.json.decode(out, type=FleetReport)

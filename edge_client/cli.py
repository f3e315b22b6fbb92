"""The ``fedge`` command: what a device can do, and the sub-commands that the other rooms bring."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_client.address import Address
from edge_client.doctor import broker, device, finding
from edge_client.errors import ConfigError, FedgeError
from edge_client.feeds.opening import Feeds
from edge_client.reporting import sharing
from edge_client.service.board import Board
from edge_client.service.gate import Gate
from edge_client.service.notify import Notifier
from edge_client.service.settings import CONFIG, DeviceSettings
from edge_client.service.wear import Wear
from edge_client.shelf import Shelf
from edge_client.store import WITNESS, FileCopies, Store, claimed
from edge_client.tls import Tls
from edge_client.transport import Link, MqttLink
from edge_client.wire.envelope import Stamp
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Member, PlainMember

if TYPE_CHECKING:
    from edge_client.service.update import Updater
    from edge_client.trust.identity import Identity

_EXTRAS = {"broker_server": "server", "deploy": "server", "export": "export"}


class _Commands(click.Group):
    """Sub-commands by entry point, loaded when they are called: a device does not import what it has not got."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(point.name for point in _points())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for point in _points():
            if point.name == cmd_name:
                return _load(point)
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                rows.append((name, command.get_short_help_str(80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _points() -> list[EntryPoint]:
    return list(entry_points(group="fedge.commands"))


def _load(point: EntryPoint) -> click.Command:
    try:
        command = point.load()
    except ModuleNotFoundError as error:
        return _missing(point, error.name or "a package")
    assert isinstance(command, click.Command)
    return command


def _missing(point: EntryPoint, package: str) -> click.Command:
    extra = _EXTRAS.get(point.module.split(".")[0], "demo")
    if point.name == "demo":
        extra = "demo"

    @click.command(
        point.name,
        short_help=f"(needs the extra {extra!r}: pip install 'fedge[{extra}]')",
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
    )
    @click.argument("rest", nargs=-1, type=click.UNPROCESSED)
    def refuse(rest: tuple[str, ...]) -> None:
        raise ConfigError(f"{point.name!r} needs {package}, which is not installed here: pip install 'fedge[{extra}]'")

    return refuse


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedge")
def cli() -> None:
    """Federated learning on real edge devices, over MQTT."""


def main() -> None:
    """Run the command line; a mistake of the user's is one line on standard error and exit status 2."""
    if sys.maxsize < 2**32:
        click.echo("fedge: this Python is 32-bit, ONNX Runtime has no 32-bit build: use a 64-bit system", err=True)
        sys.exit(2)
    try:
        cli()
    except FedgeError as error:
        click.echo(f"fedge: {error}", err=True)
        sys.exit(2)


IDENTITY = click.option(
    "--identity",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder that says who this is, for mqtts://.  [default: identity in the state's folder, where there is one]",
)
INSECURE = click.option("--insecure", is_flag=True, help="Go to another machine's broker without TLS or without keys.")


@click.command()
@click.argument("url")
@CONFIG
@click.option("--id", "client", required=True, help="This device's name in the federation, unique in it.")
@click.option(
    "--data", required=True, help="An .npz file, a folder of .csv files, module:function, drop:FOLDER or ring:FOLDER."
)
@click.option("--federation", default=None, help="The federation's name; also as the URL's path.  [default: default]")
@click.option("--holdout", default=0.0, help="Share of the samples to evaluate on instead of training.")
@click.option("--state", type=click.Path(path_type=Path), default=None, help="Folder for this device's state.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads to train with.", show_default=True)
@click.option("--spin", is_flag=True, help="Keep the threads awake within a step: faster, and warmer.")
@click.option("--uplink", default=0.0, help="Bytes a second that the link can send, where known.")
@click.option("--memory-limit", metavar="MIB", type=click.IntRange(min=1), default=None, help="Train nothing larger.")
@click.option("--share", default="", help="Tell of the data where asked: labels, features, both with a comma, nothing.")
@click.option("--once", is_flag=True, help="Leave when the federation has finished.")
@IDENTITY
@INSECURE
def join(
    url: str,
    config: DeviceSettings,
    client: str,
    data: str,
    federation: str | None,
    holdout: float,
    state: Path | None,
    threads: int,
    spin: bool,
    uplink: float,
    memory_limit: int | None,
    share: str,
    once: bool,
    identity: Path | None,
    insecure: bool,
) -> None:
    """Be a client: train when invited, upload, keep going.

    URL is the broker's, mqtts://host[:port][/federation], or mqtt://[user:password@]host on this machine. A broker that
    cannot be reached is tried again, with growing pauses, until it can.
    """
    # ONNX Runtime kills the process on some processors: whoever asks the doctor why must not load it.
    from edge_client import runtime
    from edge_client.device import Device, Workshop
    from edge_client.service.attendant import Attendant

    address = Address.parse(url)
    address.check(insecure=insecure)
    name = federation or address.federation or "default"
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", client):
        raise ConfigError(f"--id {client!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ConfigError(f"federation {name!r}: expected 1 to 64 letters, digits, dashes or underscores")
    if not 0 <= holdout < 1:
        raise ConfigError(f"--holdout {holdout}: expected 0 or more and less than 1")
    if not 0 <= uplink <= 1e12:
        raise ConfigError(f"--uplink {uplink}: expected bytes a second, 0 where they are not known")
    folder, shares = state or default_state(name, client), sharing(share)
    member = _identity(identity or folder / "identity", name, client, required=identity is not None)
    if member is None:
        _check_unsigned(address, folder, insecure=insecure)
    tls = None if member is None else member.tls

    def connect(will: tuple[str, bytes]) -> Link:
        return MqttLink(address, f"fedge-{name}-{client}", will, tls=tls)

    def log(line: str) -> None:
        click.echo(line, err=True)

    wear = Wear()
    updater = None if member is None else _updater(member, folder, Path(config.releases), wear)
    feeds = Feeds(
        data,
        log,
        holdout=holdout,
        quiet=config.data.quiet,
        retention=config.data.retention,
        memory=config.data.memory_mib << 20,
    )

    async def run() -> None:
        workshop = Workshop(1, threads=threads, spin=spin, memory_limit=(memory_limit or 0) << 20)
        voice, remember = _voice(member, folder)
        device = Device(
            client=client,
            federation=name,
            connect=connect,
            store=Store(folder, wrote=wear.wrote),
            copies=FileCopies(folder, wrote=wear.wrote),
            workshop=workshop,
            open_data=feeds.open,
            log=log,
            software=version("fedge"),
            uplink=uplink,
            voice=voice,
            remember=remember,
            updater=updater,
            shelf=Shelf(folder / "model", pause=config.model_minutes * 60, wrote=wear.wrote),
            shares=shares,
        )
        log(f"{client}: joining {name!r} at {address}")
        gate, notifier = Gate(config.training), Notifier(os.environ)
        attendant = Attendant(device, feeds, gate, Board(), notifier, log, config.stall, wear)
        try:
            async with attendant.attending(), _renewing(member, log, lambda name: MqttLink(address, name, tls=tls)):
                await run_until_signal(device.run, device.close, device.done if once else None)
        finally:
            workshop.close()

    runtime.spare_memory()
    with claimed(folder):
        asyncio.run(run())


@click.command()
@click.argument("url", required=False)
@click.option("--broker", "probed", metavar="URL", default=None, help="Examine this broker instead of the device.")
@click.option("--state", type=click.Path(path_type=Path), default=None, help="Folder for this device's state.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings for a program.")
@IDENTITY
@INSECURE
def doctor(
    url: str | None, probed: str | None, state: Path | None, as_json: bool, identity: Path | None, insecure: bool
) -> None:
    """Say whether fedge will work here, and what to set.

    Examines this device, and whether it reaches the broker at URL where one is given. With --broker it examines what
    that broker does instead; name the server's user there, who may read and write fedge/#, or with --identity the
    authority's folder, where the server's certificate is. The exit status is 1 where something has to be changed first.
    """
    reports, folder = [], state or Path.home() / ".local" / "state" / "fedge"
    tls = _known(identity, folder)
    addresses = {one: Address.parse(one) for one in (url, probed) if one is not None}
    for address in addresses.values():
        address.check(insecure=insecure)
    if probed is not None:
        address = addresses[probed]
        reports.append(broker.examine(address, address.federation or _federation(tls), tls))
    if probed is None or url is not None:
        reports.append(device.examine(folder, None if url is None else addresses[url], tls=tls))
    if as_json:
        click.echo(finding.to_json(reports))
    else:
        finding.tell(reports, click.echo)
    sys.exit(0 if all(one.works for one in reports) else 1)


def _known(identity: Path | None, state: Path) -> Tls | None:
    """Who this is.

    Raises:
        ConfigError: the folder that was named has no identity.
    """
    found = Tls.found(identity or state / "identity")
    if found is None and identity is not None:
        raise ConfigError(f"--identity {identity}: there is no device.crt; expected a folder that `fedge enroll` made")
    return found


def _federation(tls: Tls | None) -> str | None:
    """The federation whose authority is trusted; None where that is not one of fedge's."""
    if tls is None or tls.ca is None:
        return None
    # Without an identity the library of certificates is not loaded.
    from edge_client.trust.certificate import Certificate

    try:
        return Certificate.parse(tls.ca.read_bytes()).federation
    except (OSError, ConfigError):
        return None


def _identity(folder: Path, federation: str, client: str, *, required: bool) -> "Identity | None":
    """Who this device is, where it is enrolled.

    Raises:
        ConfigError: the identity is another one's or damaged, or is not there and is required.
    """
    if not required and not (folder / "device.crt").exists():
        return None
    # A device that is not enrolled does not load what identities are made with.
    from edge_client.trust.identity import Identity

    found = Identity.load(folder)
    if (found.client, found.federation) != (client, federation):
        raise ConfigError(
            f"{folder} is the identity of {found.client!r} in federation {found.federation!r}; expected {client!r} in "
            f"{federation!r}: say so with --id and --federation, or name another folder with --identity"
        )
    return found


def _check_unsigned(address: Address, state: Path, *, insecure: bool) -> None:
    """Refuse to speak unsigned, and to believe what is unsigned, where that may be less than what was agreed on.

    Raises:
        ConfigError: the device was enrolled once, or the broker is elsewhere and this not ``insecure``.
    """
    left = next((path for path in (state / "identity", state / WITNESS) if path.exists()), None)
    if left is not None:
        raise ConfigError(
            f"{left} is there, so this device was enrolled, and device.crt is not: it would believe anybody; enrol it "
            "(fedge enroll), name its identity with --identity, or for a federation without keys another --state"
        )
    if not (address.loopback or insecure):
        raise ConfigError(
            f"{state / 'identity'} is not there, so nothing that comes by {address} would be signed; enrol this device "
            "(fedge enroll), name its identity with --identity, or say --insecure where you trust the broker"
        )


def _voice(identity: "Identity | None", state: Path) -> "tuple[Member, Callable[[Stamp, float], None]]":
    """How a device speaks, and what remembers what it has believed; who is not enrolled does not sign."""
    if identity is None:
        return PlainMember(), lambda _stamp, _issued: None
    from edge_client.trust.speech import identity_voice

    return identity_voice(identity, state, time.time())


def _updater(identity: "Identity", state: Path, releases: Path, wear: Wear) -> "Updater":
    """What takes new releases of the client; a device that is not enrolled believes nobody's."""
    from edge_client.service.update import Updater
    from edge_client.trust.keys import verify
    from edge_client.trust.release import here

    def believed(data: bytes, signature: bytes) -> bool:
        return any(verify(pin, data, signature) for pin in identity.pins)

    topics, running = Topics(identity.federation), version("fedge")
    found = Updater(state / "release", releases, topics, believed, running, here(), wear.wrote)
    # Before the first hello: a client on trial has to say that it is.
    found.look(joined=False)
    return found


@asynccontextmanager
async def _renewing(
    identity: "Identity | None", log: Callable[[str], None], connect: Callable[[str], Link]
) -> AsyncIterator[None]:
    if identity is None:
        yield
        return
    from edge_client.trust.enrol import renewing

    async with renewing(identity, log, connect):
        yield


def default_state(federation: str, client: str) -> Path:
    """Where a device keeps its state unless it is told."""
    return Path.home() / ".local" / "state" / "fedge" / federation / client


async def run_until_signal(
    run: Callable[[], Coroutine[None, None, None]],
    close: Callable[[], Coroutine[None, None, None]],
    done: asyncio.Event | None = None,
) -> None:
    """Run until SIGTERM, SIGINT or ``done``, then close in good order."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    life = asyncio.ensure_future(run())
    ends = [asyncio.ensure_future(over.wait())]
    if done is not None:
        ends.append(asyncio.ensure_future(done.wait()))
    await asyncio.wait((life, *ends), return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if not life.done():
        await close()
    await life


if __name__ == "__main__":
    main()

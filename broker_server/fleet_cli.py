"""The sub-command fleet: what devices there are and how they are, who pauses, and new releases of their client."""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_client.errors import ConfigError

if TYPE_CHECKING:
    # `fedge --help` loads every command.
    from broker_server.config import Federation
    from broker_server.inventory import Device, Inventory
    from broker_server.rollout import Rollout, Seat
    from edge_client.trust.release import File

_FILE = "federation.toml"
_DAY = 86_400.0


class _Fleet(click.Group):
    """A group whose first argument may be left out: ``fedge fleet pause pi-7`` is of `_FILE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = [word for word in args if not word.startswith("-")]
        if not named or named[0] in self.commands:
            args = [_FILE, *args]
        if "--json" in args:
            args = ["--json", *(word for word in args if word != "--json")]
        return super().parse_args(ctx, args)


@click.group(cls=_Fleet, invoke_without_command=True, subcommand_metavar="[COMMAND [ARGS]...]")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what is known of every device for a program.")
@click.pass_context
def fleet(context: click.Context, file: Path, as_json: bool) -> None:
    """List devices and how they are; have them pause; bring a new client to them.

    FILE is the federation's TOML file, federation.toml unless it is named. All of this works while the server runs and
    while it does not; then it is done at the next start.
    """
    from broker_server.config import load

    context.obj = load(file)
    if context.invoked_subcommand is None:
        _list(context.obj, as_json=as_json)


_WHO = click.argument("clients", nargs=-1)
_ALL = click.option("--all", "everyone", is_flag=True, help="Every device, also those to come.")


@fleet.command()
@_WHO
@_ALL
@click.pass_obj
def pause(settings: "Federation", clients: tuple[str, ...], everyone: bool) -> None:
    """Ask no work of devices.

    One that is at a task ends it, and its update counts. A device that pauses still gets new releases.
    """
    _pause(settings, clients, everyone=everyone, paused=True)


@fleet.command()
@_WHO
@_ALL
@click.pass_obj
def resume(settings: "Federation", clients: tuple[str, ...], everyone: bool) -> None:
    """Ask work of devices again; --all also of those that were paused by name."""
    _pause(settings, clients, everyone=everyone, paused=False)


@fleet.command()
@click.argument("client")
@click.pass_context
def retire(context: click.Context, client: str) -> None:
    """Ask nothing of a device any more, for good.

    Where the federation has an authority, what it has certified for the device is revoked (as `fedge revoke` does).
    """
    settings: Federation = context.obj
    now = time.time()
    with _inventory(settings) as inventory:
        enrolled = _enrolled(settings)
        if client not in enrolled and client not in inventory.devices():
            raise ConfigError(f"{client!r} is no device of this fleet; `fedge fleet` lists them")
        inventory.retire(client, now)
    if client in enrolled:
        from broker_server.authority_cli import revoke

        context.invoke(revoke, name=client, folder=Path(settings.trust.authority))
    click.echo(f"{client} is retired: nothing is asked of it any more")


@fleet.command()
@click.argument("wheels", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--waves", "waves_", default="1,10%,100%", show_default=True, help="Devices that have it by each wave.")
@click.option("--failing", default=0.1, show_default=True, help="Share of a wave that may fail.")
@click.option("--patience", default=30.0, show_default=True, help="Minutes without news after which one has failed.")
@click.option("--valid", default=30.0, show_default=True, help="Days for which the release may be installed.")
@click.option("--downgrade", is_flag=True, help="Let it take the place of a newer version.")
@click.pass_obj
def update(
    settings: "Federation",
    wheels: tuple[Path, ...],
    waves_: str,
    failing: float,
    patience: float,
    valid: float,
    downgrade: bool,
) -> None:
    """Bring a new client to the devices, in waves.

    WHEELS are files or folders of them: fedge's, and all that it needs, for every kind of device there is. They are
    signed with the federation's key. The next wave gets them when all of one run them; where too many do not, the
    rollout stops. A device whose new client does not hear the server goes back to the one before by itself.
    """
    from broker_server.authority import Authority
    from broker_server.rollout import Rollout, waves
    from edge_client.trust.release import Record, seal, versions

    if not 0 <= failing <= 1 or not 0 < patience <= 10_000 or not 0 < valid <= 3650:
        raise ConfigError("--failing is a share from 0 to 1, --patience and --valid are minutes and days above 0")
    plan = waves(waves_)
    if not settings.trust.authority:
        raise ConfigError("a release is signed with the federation's key, and this one has none: set trust.authority")
    authority = Authority.load(Path(settings.trust.authority))
    paths = sorted({path for named in wheels for path in (named.glob("*.whl") if named.is_dir() else (named,))})
    found = sorted(versions(path.name for path in paths))
    if len(found) != 1:
        which = f"has fedge {', '.join(found)}" if found else "has none of fedge"
        raise ConfigError(f"{', '.join(map(str, wheels))} {which}; expected wheels of one version of it")
    files = tuple(_adopted(settings, path) for path in paths)
    now = time.time()
    record = Record(1, settings.federation.name, found[0], now, now + valid * _DAY, files, downgrade, authority.pins)
    rollout = Rollout(found[0], seal(record, authority.signing.sign), plan, failing, patience * 60)
    with _inventory(settings) as inventory:
        devices = inventory.devices()
        number = inventory.begin(rollout, now)
    _tidy(settings, files)
    size = sum(file.blob.size for file in files) / 2**20
    click.echo(f"release {found[0]}: {len(files)} wheels, {size:,.1f} MiB, signed; rollout {number} in waves {waves_}")
    if not any(path.name.startswith("pip-") for path in paths):
        click.echo("there is no wheel of pip: devices without ensurepip (Debian's python3-venv) cannot install it")
    for line in _lacking(devices.values(), files):
        click.echo(line)


@fleet.command()
@click.pass_obj
def halt(settings: "Federation") -> None:
    """Stop the rollout under way; devices that have the release keep it."""
    import msgspec

    with _inventory(settings) as inventory, inventory.group():
        latest = inventory.latest()
        if latest is None or latest[1].state == "stopped":
            raise ConfigError("no rollout is under way; `fedge fleet` shows the last one")
        number, rollout = latest
        inventory.keep(number, msgspec.structs.replace(rollout, state="stopped", reason="the operator stopped it"))
    click.echo(f"release {rollout.version}: nobody else is asked")


def _pause(settings: "Federation", clients: tuple[str, ...], *, everyone: bool, paused: bool) -> None:
    if everyone == bool(clients):
        raise ConfigError("name devices, or say --all for every one of them")
    with _inventory(settings) as inventory:
        if everyone:
            inventory.pause_all(paused=paused)
            click.echo(f"every device {'pauses' if paused else 'works'}")
            return
        known = {*inventory.devices(), *_enrolled(settings)}
        unknown = [client for client in clients if client not in known]
        if unknown:
            raise ConfigError(f"{', '.join(unknown)}: no such devices in this fleet; `fedge fleet` lists them")
        if inventory.everyone and not paused:
            raise ConfigError("every device pauses, whatever it is called: fedge fleet resume --all")
        inventory.pause(clients, paused=paused)
    click.echo(f"{', '.join(clients)} {'pause' if paused else 'work'}{'s' if len(clients) == 1 else ''}")


def _inventory(settings: "Federation") -> "Inventory":
    from broker_server.inventory import Inventory

    return Inventory.open(Path(settings.federation.state))


def _enrolled(settings: "Federation") -> dict[str, str]:
    """Devices that have a certificate or had one, and what became of it."""
    if not settings.trust.authority:
        return {}
    from broker_server.authority import REGISTRY
    from broker_server.registry import standing

    valid, gone = standing(Path(settings.trust.authority) / REGISTRY, time.time())
    return dict.fromkeys(valid, "") | dict.fromkeys(gone, "revoked or expired")


def _adopted(settings: "Federation", path: Path) -> "File":
    """A wheel's copy in the state folder, where the server publishes it from."""
    from broker_server.fleet import RELEASES
    from edge_client.trust.release import File
    from edge_client.wire.messages import BlobRef

    data = path.read_bytes()
    if not data.startswith(b"PK"):
        raise ConfigError(f"{path} is no wheel; expected files that `pip download` or `pip wheel` made")
    ref = BlobRef(hashlib.sha256(data).digest(), len(data), settings.transfer.chunk)
    target = Path(settings.federation.state) / RELEASES / ref.sha256.hex()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(target.name + ".new")
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); check disk and permissions") from error
    return File(path.name, ref)


def _tidy(settings: "Federation", files: "tuple[File, ...]") -> None:
    """Remove the files of releases before: nobody is asked to take one of them any more."""
    from broker_server.fleet import RELEASES

    kept = {file.blob.sha256.hex() for file in files}
    for path in (Path(settings.federation.state) / RELEASES).iterdir():
        if path.name not in kept:
            with contextlib.suppress(OSError):
                path.unlink()


def _lacking(devices: "Iterable[Device]", files: "tuple[File, ...]") -> list[str]:
    """Which kinds of devices the wheels do not fit."""
    from edge_client.errors import WireError
    from edge_client.trust.release import fitting

    lines = []
    for platform in sorted({one.said.condition.platform for one in devices if one.said is not None} - {""}):
        try:
            fitting(files, platform)
        except WireError as error:
            lines.append(f"devices with {platform} do not get it: {error}")
    return lines


def _list(settings: "Federation", *, as_json: bool) -> None:
    with _inventory(settings) as inventory, inventory.group():
        devices, everyone, latest = inventory.devices(), inventory.everyone, inventory.latest()
        seats = inventory.seats(latest[0]) if latest else {}
    from broker_server.inventory import Device

    enrolled, now = _enrolled(settings), time.time()
    for client in enrolled:
        devices.setdefault(client, Device(client, 0.0, None))
    rows = [_row(one, enrolled.get(name, ""), now, everyone=everyone) for name, one in sorted(devices.items())]
    if as_json:
        import msgspec

        about = None if latest is None else _rollout(latest[1], seats)
        said = {"federation": settings.federation.name, "paused": everyone, "devices": rows, "rollout": about}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(said), indent=2).decode() + "\n")
        return
    _show(settings, rows, latest, seats)


def _row(device: "Device", standing: str, now: float, *, everyone: bool) -> dict[str, Any]:
    """What is known of a device, for people and for programs."""
    from broker_server.rollout import PRESENT

    said = device.said
    row: dict[str, Any] = {"client": device.client, "seen": device.seen or None, "state": "never seen"}
    if said is not None:
        about, progress = said.condition, said.condition.progress
        row |= {"client_version": said.software, "model_version": said.model, "samples": said.samples}
        row |= {"degrees": about.degrees, "disk": about.disk, "memory": about.memory, "written": about.written}
        row |= {"rests": about.rests, "platform": about.platform}
        row["state"] = "away" if now - device.seen > PRESENT else "ready" if said.available else "rests"
        if progress is not None:
            row["release"] = {"version": progress.version, "stage": progress.stage, "detail": progress.detail}
    if device.paused or everyone:
        row["state"] = "paused"
    if standing:
        row["state"] = standing
    if device.retired is not None:
        row["state"] = "retired"
    return row


def _rollout(rollout: "Rollout", seats: "dict[str, Seat]") -> dict[str, Any]:
    return {
        "version": rollout.version,
        "state": rollout.state,
        "reason": rollout.reason,
        "wave": rollout.wave + 1,
        "waves": rollout.waves,
        "devices": {
            client: {"wave": seat.wave + 1, "state": seat.state, "reason": seat.reason}
            for client, seat in seats.items()
        },
    }


def _show(
    settings: "Federation",
    rows: list[dict[str, Any]],
    latest: "tuple[int, Rollout] | None",
    seats: "dict[str, Seat]",
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edge_client.terminal import printable

    console = Console(highlight=False)
    if not rows:
        console.print(f"{settings.federation.name}: no device has been seen yet")
        return
    head = ("device", "state", "seen", "model", "samples", "°C", "disk", "memory", "a day", "client", "release")
    shown = Table(*head, title=settings.federation.name, header_style="bold")
    now = time.time()
    for row in rows:
        release = row.get("release")
        why = row.get("rests") if row["state"] == "rests" else ""
        cells = (
            row["client"],
            f"{row['state']}: {why}" if why else row["state"],
            _ago(row["seen"], now),
            _number(row.get("model_version")),
            _number(row.get("samples")),
            _number(row.get("degrees")),
            _bytes(row.get("disk")),
            _bytes(row.get("memory")),
            _bytes(row.get("written")),
            row.get("client_version", ""),
            " ".join((release["version"], release["stage"], release["detail"])) if release else "",
        )
        # What devices say of themselves is a stranger's.
        shown.add_row(*(escape(printable(cell)) for cell in cells))
    console.print(shown)
    if latest is not None:
        _, rollout = latest
        counts = {state: sum(seat.state == state for seat in seats.values()) for state in _ORDER}
        told = ", ".join(f"{count} {_ORDER[state]}" for state, count in counts.items() if count)
        where = f"wave {rollout.wave + 1} of {len(rollout.waves)}" if rollout.state == "running" else rollout.state
        reason = f" ({printable(rollout.reason)})" if rollout.reason else ""
        line = f"release {rollout.version}: {where}{reason}; {told or 'nobody was asked yet'}"
        console.print(line, markup=False, soft_wrap=True)


_ORDER = {"healthy": "run it", "failed": "failed", "taken": "at it", "asked": "asked", "missed": "not reached"}


def _ago(seen: float | None, now: float) -> str:
    if seen is None:
        return "never"
    seconds = max(0.0, now - seen)
    for unit, length in (("d", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _bytes(value: int | None) -> str:
    from broker_server.report import human_bytes

    return "" if value is None else human_bytes(value)

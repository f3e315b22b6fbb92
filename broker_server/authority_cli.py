"""The sub-commands of the authority: ca, claim, approve, revoke."""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_client.errors import ConfigError

if TYPE_CHECKING:
    # `fedge --help` loads every command.
    from broker_server.authority import Authority
    from broker_server.registry import ClaimRow, Registry

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_PORT = 8883
_MOST = 10_000
_AUTHORITY = click.option(
    "-a",
    "--authority",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("authority"),
    show_default=True,
    help="The authority's folder.",
)


@click.group()
def ca() -> None:
    """Make a federation's authority; show what it has certified."""


@ca.command("init")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("authority"), show_default=True)
@click.option("--federation", required=True, help="The federation's name.")
@click.option("--host", "hosts", multiple=True, required=True, help="Name or address of the broker; the first is used.")
def init(output: Path, federation: str, hosts: tuple[str, ...]) -> None:
    """Make a federation's authority.

    Writes keys and certificates for the federation, the broker, the server and enrolment. Whoever has the folder
    decides who belongs to the federation: keep it on the server, and a copy in a safe place.
    """
    from broker_server.authority import Authority

    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", federation):
        raise ConfigError(f"--federation {federation!r}: expected 1 to 64 letters, digits, dashes or underscores")
    _believe_clock()
    made = Authority.init(output, federation, hosts, now=time.time())
    click.echo(f"{output} is the authority of {made.federation!r}: set trust.authority in the federation's file")
    click.echo(f"next: fedge claim -a {output}, and on a device: fedge enroll CLAIMFILE --id NAME")


@ca.command("broker")
@_AUTHORITY
@click.option("--host", "hosts", multiple=True, required=True, help="Name or address of the broker; the first is used.")
def broker(folder: Path, hosts: tuple[str, ...]) -> None:
    """Name the broker anew.

    It gets a new key and certificate; configure it again, and make new claims. Devices go on trusting it.
    """
    _load(folder).rename_broker(hosts)
    click.echo(f"{folder / 'broker.crt'} is for {', '.join(hosts)} now: fedge broker config")


@ca.command("show")
@_AUTHORITY
def show(folder: Path) -> None:
    """List devices, and what waits for approval."""
    from broker_server.registry import Registry

    authority = _load(folder)
    with Registry.open(_registry(folder)) as registry:
        devices, claims, now = registry.devices(), registry.claims("open", "pending"), time.time()
    click.echo(f"{authority.federation}: {len(devices)} devices")
    for device in devices:
        state = "revoked" if device.revoked is not None else "expired" if now >= device.expires else "enrolled"
        click.echo(f"{device.client}  {state}, certificate until {_day(device.expires)}")
    click.echo(f"open claims: {sum(claim.state == 'open' and now < claim.expires for claim in claims)}")
    _list(claim for claim in claims if claim.state == "pending")


@click.command()
@_AUTHORITY
@click.option(
    "--count", type=click.IntRange(1, _MOST), default=1, show_default=True, help="Claims; one enrols one device."
)
@click.option("--valid", default="7d", show_default=True, help="How long, as 12h, 7d or 4w.")
@click.option("--broker", "url", default=None, help="The broker's URL for devices.  [default: mqtts://HOST:8883]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("claims"), show_default=True)
def claim(folder: Path, count: int, valid: str, url: str | None, output: Path) -> None:
    """Make claims, files that each enrol one device.

    A claim is a secret until it is used: whoever has it may enrol in the place of a device.
    """
    from broker_server.registry import Registry
    from edge_client.address import Address
    from edge_client.trust.claim import SUFFIX

    authority, seconds = _load(folder), _seconds(valid)
    host = f"[{authority.host}]" if ":" in authority.host else authority.host
    address = Address.parse(url or f"mqtts://{host}:{_PORT}")
    if address.federation not in (None, authority.federation):
        raise ConfigError(f"--broker {address}/{address.federation}: expected no path, or {authority.federation!r}")
    _believe_clock()
    now = time.time()
    made = authority.claims(count, seconds, str(address), now=now)
    # A claim that is registered and not written is lost; the other way round it would be refused.
    with Registry.open(_registry(folder)) as registry:
        registry.add_claims(
            ((one.user, certificate.public, certificate.serial, one.expires) for one, certificate in made), now
        )
    for one, _ in made:
        one.save(output / f"{one.user[1:]}{SUFFIX}")
    click.echo(f"{count} claim{'s' if count > 1 else ''} in {output}, good until {_day(made[0][0].expires)}")


@click.command()
@click.argument("name", required=False)
@_AUTHORITY
@click.option("--refuse", is_flag=True, help="Refuse it instead.")
def approve(name: str | None, folder: Path, refuse: bool) -> None:
    """Approve a device that waits; without NAME, list those that do.

    NAME is the device's, or where two ask for the same one that of the claim.
    """
    from broker_server.registry import Registry

    _load(folder)
    with Registry.open(_registry(folder)) as registry:
        pending = registry.claims("pending")
        if name is None:
            _list(pending)
            return
        found = [one for one in pending if name in (one.client, one.user, one.user[1:])]
        if not found:
            raise ConfigError(f"nothing waits for approval by the name {name!r}; `fedge approve` lists what does")
        if len(found) > 1:
            users = ", ".join(one.user[1:] for one in found)
            raise ConfigError(f"{len(found)} devices ask for the name {name!r}; name one of the claims {users}")
        (one,) = found
        if not registry.decide(one.user, approved=not refuse, detail="the operator has refused it" if refuse else ""):
            raise ConfigError(f"{name!r} waits no more; somebody has decided meanwhile")
    click.echo(f"{one.client} is {'refused' if refuse else 'approved'}")


@click.command()
@click.argument("name")
@_AUTHORITY
def revoke(name: str, folder: Path) -> None:
    """Shut a device out, at once and for good.

    NAME is a device's, or that of a claim that was lost. The key is never certified again, nor the name before what was
    revoked has expired; with a new key, a new claim and another name the device may come back.
    """
    from broker_server.authority import CA_KEY, telling_brokers
    from broker_server.broker_config.reload import reload_all
    from broker_server.registry import Registry

    authority, now = _load(folder), time.time()
    with Registry.open(_registry(folder)) as registry:
        claim = None
        if re.fullmatch(r"@?claim-[0-9a-f]{8}", name) and registry.device(name) is None:
            claim = registry.claim(f"@{name.removeprefix('@')}")
            gone = claim is not None and registry.withdraw(claim.user, now)
        else:
            gone = registry.revoke(name, now)
        if not gone and not _listed(registry, name):
            raise ConfigError(f"{name!r} is no device that is enrolled, and no claim; see `fedge ca show`")
        click.echo(f"{name} is revoked, and the server knows it")
        if claim is not None and claim.state == "issued":
            click.echo(f"{claim.client} was enrolled with it, and stays: fedge revoke {claim.client} shuts that out")
        # Also where it is revoked already: the list may have been lost after that.
        with telling_brokers(folder):
            if authority.key is not None:
                authority.write_crl(registry.revoked(now), now=now)
            valid, revoked = registry.standing(now)
            for line in reload_all(folder, devices=valid, revoked=revoked):
                click.echo(line)
    if authority.key is None:
        raise ConfigError(
            f"{name} is revoked at the server and in the brokers' rules, and may still connect: put {folder / CA_KEY} "
            "back and say this again, the list of revoked certificates is signed with that key"
        )


def _listed(registry: "Registry", name: str) -> bool:
    device = registry.device(name)
    return device is not None and device.revoked is not None


def _list(pending: "Iterable[ClaimRow]") -> None:
    rows = list(pending)
    for one in rows:
        key = (one.device or b"").hex()[:16]
        click.echo(f"{one.client}  waits since {_day(one.asked or 0.0)}, {one.user[1:]}, key {key}")
    if not rows:
        click.echo("nothing waits for approval")


def _load(folder: Path) -> "Authority":
    from broker_server.authority import Authority

    return Authority.load(folder)


def _registry(folder: Path) -> Path:
    from broker_server.authority import REGISTRY

    return folder / REGISTRY


def _believe_clock() -> None:
    from edge_client.trust.clock import believable

    if (doubt := believable(time.time(), 0.0)) is not None:
        raise ConfigError(f"{doubt}; what was certified now would have expired when it is set")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smhdw])", text)
    if found is None or not 0 < float(found[1]) * _UNITS[found[2]] <= 3650 * _UNITS["d"]:
        raise ConfigError(
            f"--valid {text!r}: expected a number and one of s, m, h, d, w, such as 7d; at most ten years"
        )
    return float(found[1]) * _UNITS[found[2]]


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))

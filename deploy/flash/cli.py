"""The sub-command flash."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from edge_client.errors import ConfigError, FlashError

if TYPE_CHECKING:
    # `fedge --help` loads every command.
    from deploy.flash.batch import Card
    from deploy.flash.prepare import Bench
    from deploy.flash.settings import CardSettings, Wifi
    from deploy.flash.target import Device

_FORCE = ("mounted", "system", "fixed", "customised")


@click.command()
@click.argument("source", required=False)
@click.option("--build", is_flag=True, help="Build a small system of Debian packages, and take that as SOURCE.")
@click.option("--mirror", default=None, help="Debian archive to build from.  [default: as this machine's apt has it]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write an image to this file; several to a folder."
)
@click.option("--device", type=click.Path(path_type=Path), help="Write to this card, such as /dev/sdb.")
@click.option("--sha256", default=None, help="SHA-256 of the image, which a URL needs.")
@click.option("--hostname", default="pi", show_default=True, help="The device's name; of several, they get -1, -2 ...")
@click.option("--wifi", "network", metavar="SSID[:PASSPHRASE]", help="Wi-Fi to join; the passphrase is asked for.")
@click.option("--wifi-key", type=click.Path(path_type=Path), help="File with the passphrase.")
@click.option("--country", default=None, help="Country of the Wi-Fi, two letters, such as GB.")
@click.option(
    "--ssh-key", "ssh_keys", multiple=True, type=click.Path(path_type=Path), help="Public key file; for login."
)
@click.option("--user", default="pi", show_default=True, help="User who may log in with it.")
@click.option("--server", default=None, help="The broker's URL: mqtts://HOST:8883/FEDERATION.  [default: the claim's]")
@click.option("--insecure", is_flag=True, help="Let the device go to another machine's broker without TLS.")
@click.option("--claim", type=click.Path(path_type=Path), help="Claim of the device, made by `fedge claim`.")
@click.option("--claims", type=click.Path(path_type=Path), help="Folder of claims, one for each of several cards.")
@click.option("--count", type=click.IntRange(1, 10_000), default=None, help="Cards to write, one after the other.")
@click.option("--data", default=None, help="Where samples come from.  [default: drop:/var/lib/fedge/data]")
@click.option("--max-size", default="256G", show_default=True, help="Refuse a larger card: it may be another disk.")
@click.option("--force", "insisted", multiple=True, type=click.Choice(_FORCE), help="Go on although it is so.")
@click.option("--cache", type=click.Path(path_type=Path), default=None, help="Folder for downloads and wheels.")
def flash(
    source: str | None,
    build: bool,
    mirror: str | None,
    output: Path | None,
    device: Path | None,
    sha256: str | None,
    hostname: str,
    network: str | None,
    wifi_key: Path | None,
    country: str | None,
    ssh_keys: tuple[Path, ...],
    user: str,
    server: str | None,
    insecure: bool,
    claim: Path | None,
    claims: Path | None,
    count: int | None,
    data: str | None,
    max_size: str,
    insisted: tuple[str, ...],
    cache: Path | None,
) -> None:
    """Make cards of Raspberry Pis that enrol and train by themselves.

    SOURCE is an image of Raspberry Pi OS Lite (64-bit), packed or not, or its URL; or a card that is written already,
    of which only the boot partition is changed. Without -o and --device it says what SOURCE is. Nothing is mounted, and
    root is needed for no more than a card that you may not write otherwise.

    With --build it makes a system of its own from Debian packages, for a Pi 3, 4, 400 or Zero 2 W, and keeps it for the
    next time. A Pi 5 needs Raspberry Pi OS.
    """
    from deploy.flash import batch, prepare, target, wheels
    from deploy.flash.image import is_device

    if build == (source is not None):
        raise ConfigError("name SOURCE, an image of Raspberry Pi OS Lite (64-bit), or say --build and name none")
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedge"
    source = source or str(_built(folder, mirror))
    in_place = is_device(Path(source))
    if sum((output is not None, device is not None, in_place)) > 1:
        raise ConfigError("-o, --device, and a card as SOURCE: name one place to write to")
    if output is not None and is_device(output):
        raise ConfigError(f"-o {output} is a device, and -o writes a file; name the card with --device {output}")
    most = target.size_of(max_size)
    wanted = output is not None or device is not None or (in_place and (server or claim or claims) is not None)
    cards = batch.plan(hostname, count, claim, claims) if wanted else []
    settings_of = _settings(server, insecure, user, _keys(ssh_keys), _wifi(network, wifi_key, country), data)
    settings = [settings_of(card) for card in cards]
    if in_place and len(cards) > 1:
        raise ConfigError("a card that is written already is one device; name an image as SOURCE for several")
    if wanted and output is None and len(cards) == 1:
        # Before minutes go by with what is for nothing then.
        _check(device or Path(source), 0, most, insisted)
    if wanted and not cards:
        click.echo(f"all {count} cards are written already, says {claims}/{batch.WRITTEN}")
        return
    path = _fetched(source, sha256, folder)
    with ExitStack() as stack:
        with _bars(unpacking=path.stat().st_size if path.is_file() else 0) as (unpacked,):
            bench = stack.enter_context(prepare.opened(path, folder, unpacked))
        system = bench.system
        click.echo(f"{source}: {system.name}, 64-bit ARM, Python {system.python}; set up by {system.kind}")
        if not wanted:
            return
        if system.foreign and "customised" not in insisted:
            raise FlashError(
                f"another program has set this up already ({system.foreign}), and its settings would be lost; take a "
                "fresh image, or say --force customised"
            )
        client = {} if system.kind == "client" else wheels.collect(system.python, folder)
        if client:
            size = sum(path.stat().st_size for path in client.values())
            click.echo(f"{len(client) - 1} wheels for aarch64, {size >> 20} MiB")
        for card, one in zip(cards, settings, strict=True):
            bench.set_up(one, client, now=time.time())
            if output is not None:
                _to_image(bench, output / f"{card.name}.img" if count is not None else output)
            else:
                _to_card(bench, device or Path(source), card, most, insisted, ask=len(cards) > 1)
            card.done()


def _settings(
    server: str | None, insecure: bool, user: str, keys: tuple[str, ...], wifi: "Wifi | None", data: str | None
) -> "Callable[[Card], CardSettings]":
    from deploy.flash import settings

    def of(card: "Card") -> "CardSettings":
        claim = None if card.claim is None else settings.read_claim(card.claim, time.time())
        return settings.CardSettings(
            card.name,
            settings.server_of(server, claim),
            data or settings.DATA,
            insecure,
            wifi,
            user,
            keys,
            None if card.claim is None else card.claim.read_bytes(),
        )

    return of


def _wifi(network: str | None, key: Path | None, country: str | None) -> "Wifi | None":
    from deploy.flash.settings import Wifi

    if network is None:
        return None
    if country is None:
        raise ConfigError("--wifi needs --country, two letters such as GB: radio rules depend on it")
    ssid, colon, passphrase = network.partition(":")
    if key is not None:
        ssid, passphrase = network, _text(key).rstrip("\r\n")
    elif not colon:
        passphrase = click.prompt(f"Passphrase of {ssid}", hide_input=True)
    return Wifi.of(ssid, passphrase, country.upper())


def _keys(paths: tuple[Path, ...]) -> tuple[str, ...]:
    lines = []
    for path in paths:
        text = _text(path)
        if "PRIVATE KEY" in text:
            raise ConfigError(f"--ssh-key {path} is a private key, which stays where it is; name the file {path}.pub")
        lines += [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return tuple(lines)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def _built(cache: Path, mirror: str | None) -> Path:
    from deploy.flash import wheels
    from deploy.image.build import build
    from deploy.image.packages import PYTHON

    client = wheels.collect(f"{PYTHON[0]}.{PYTHON[1]}", cache)
    say = partial(click.echo, err=True)
    return build(list(client.values()), cache=cache / "image", mirror=mirror, log=say)


def _fetched(source: str, sha256: str | None, cache: Path) -> Path:
    from deploy.flash.fetch import fetch

    if "://" not in source:
        return Path(source)
    if sha256 is None:
        raise ConfigError("an image from a URL needs --sha256, which is published beside it")
    with _bars(fetching=None) as (bar,):
        told = 0

        def report(here: int, total: int | None) -> None:
            nonlocal told
            bar(here - told, total)
            told = here

        return fetch(source, sha256.lower(), cache / "images", report)


def _check(path: Path, needed: int, most: int, insisted: tuple[str, ...]) -> "Device":
    from deploy.flash import target

    device = target.find(path, target.Machine())
    target.check(device, needed=needed, most=most, insisted=insisted)
    return device


def _to_image(bench: "Bench", path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlashError(f"{path.parent} cannot be a folder for images ({error.strerror})") from error
    with _bars(writing=bench.base.size, checking=bench.base.size) as (wrote, read):
        bench.to_image(path, wrote, read)
    click.echo(f"{path} is written and checked")


def _to_card(bench: "Bench", path: Path, card: "Card", most: int, insisted: tuple[str, ...], *, ask: bool) -> None:
    shared = bool({"mounted", "system"} & set(insisted))
    while True:
        if ask:
            click.prompt(f"Put the card for {card.name} into {path} and press Enter", default="", show_default=False)
        try:
            if bench.in_place:
                with _bars(writing=bench.base.boot.size, checking=bench.base.boot.size) as (wrote, read):
                    bench.to_itself(wrote, read, shared=shared)
            else:
                click.echo(f"writing to {_check(path, bench.base.size, most, insisted)}")
                with _bars(writing=bench.base.size, checking=bench.base.size) as (wrote, read):
                    bench.to_device(path, wrote, read, shared=shared)
        except FlashError as error:
            if not ask:
                raise
            click.echo(f"fedge: {error}", err=True)
            continue
        click.echo(f"the card for {card.name} is written and checked: take it out")
        return


class _Bar(Protocol):
    """Is told of bytes that were dealt with, and of how many there are where that turns out only now."""

    def __call__(self, count: int, total: int | None = None, /) -> None: ...


@contextmanager
def _bars(**totals: int | None) -> Iterator[tuple[_Bar, ...]]:
    """A progress bar for each step on a terminal, and nothing elsewhere."""
    if find_spec("rich") is None:
        # A device's installation does without.
        yield tuple(lambda count, total=None: None for _ in totals)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def move(task: TaskID, count: int, total: int | None = None, /) -> None:
            progress.update(task, advance=count, total=total)

        yield tuple(partial(move, progress.add_task(what, total=total)) for what, total in totals.items())

"""A release of the client: what it is made of, signed, and what a device installs of it, and when not at all.

The record names wheels by their SHA-256; they travel apart from it, and a device fetches only those that it lacks. The
signature is the federation's and covers nothing else but this record, so whoever carries it (broker, server, the user
that the client runs as) can hold it back and not change it.
"""

import platform as machine
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edge_client.errors import TrustError, WireError
from edge_client.wire.messages import BlobRef, FederationName, Hash, Moment, Release, Version

_DOMAIN = "fedge-release/1"
_CLOCK_ERROR = 3600.0
"""Seconds that clocks may differ by and be taken for right."""
_WHEEL = re.compile(r"([A-Za-z0-9_.]+)-([0-9A-Za-z.+!_]+)(?:-[0-9][0-9A-Za-z_.]*)?-([\w.]+)-([\w.]+)-([\w.]+)\.whl\Z")
DISTRIBUTION = "fedge"
"""What a release is a release of."""

Wheel = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+!-]{0,150}\.whl\Z")]


class File(Struct, frozen=True, array_like=True):
    """A wheel: the name of its file, which says what it fits, and its bytes' name, size and size of chunks."""

    name: Wheel
    blob: BlobRef


class Record(Struct, frozen=True, array_like=True):
    """What is signed."""

    format: Literal[1]
    federation: FederationName
    version: Version
    issued: Moment
    expires: Moment
    files: Annotated[tuple[File, ...], Meta(min_length=1, max_length=200)]
    back: bool = False
    """Whether it may take the place of a newer version."""
    pins: Annotated[tuple[Hash, ...], Meta(max_length=8)] = ()
    """The public keys by which releases are believed from then on, once it has proved itself; none leaves them."""


def seal(record: Record, sign: Callable[[bytes], bytes]) -> Release:
    """The record, packed and signed."""
    data = msgspec.msgpack.encode(record)
    return Release(data, sign(_covered(data)))


def unseal(release: Release, federation: str, verify: Callable[[bytes, bytes], bool]) -> Record:
    """What a federation has signed; ``verify`` takes data and signature.

    Raises:
        TrustError: somebody else has signed it, it was changed, or it is another federation's.
        WireError: it is signed, and no record of this format.
    """
    if not verify(_covered(release.record), release.signature):
        raise TrustError("the signature of the release is not the federation's, or it was changed on its way")
    try:
        record = msgspec.msgpack.decode(release.record, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a release of another format ({error}); this client cannot install it") from error
    if record.federation != federation:
        raise TrustError(f"a release for federation {record.federation!r}; this device is in {federation!r}")
    return record


def claimed(release: Release) -> str:
    """The version that a release says it is, believed or not; empty where it says none."""
    try:
        return msgspec.msgpack.decode(release.record, type=Record).version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def admit(record: Record, *, now: float, running: str, newest: float) -> None:
    """Refuse a release that is out of date; times in seconds since 1970.

    ``running`` is the version that would be replaced, ``newest`` when the newest release was issued that was ever
    installed here: a time that has certainly passed, whatever the clock shows.

    Raises:
        TrustError: it has expired, is older than what was installed, or of a lower version and not meant to go back.
    """
    time = max(now, newest)
    if time > record.expires:
        raise TrustError(
            f"the release expired {time - record.expires:.0f} s ago: is it said again, or the clock wrong?"
        )
    if now < record.issued - _CLOCK_ERROR:
        # Whoever sets the clock back, or has none yet, could be told anything that was signed once.
        raise TrustError(
            f"the release is of {record.issued - now:.0f} s ahead of the clock: waiting for the right time"
        )
    if record.issued < newest:
        raise TrustError(f"the release is {newest - record.issued:.0f} s older than one that was installed here")
    if order(record.version) < order(running) and not record.back:
        raise TrustError(f"version {record.version} is older than {running}, and the release is not one to go back")


def order(version: str) -> tuple[tuple[int, ...], int, tuple[tuple[int, str], ...]]:
    """What versions are sorted by: numbers, whether it is before them (``rc1``) or not, and the rest."""
    found = re.match(r"v?((?:[0-9]+\.)*[0-9]+)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    rest = version[found.end() :] if found else version
    kind = 0 if re.match(r"[._-]?(?:a|b|c|rc|dev|alpha|beta|pre)", rest) else 1
    return tuple(numbers), kind, tuple(_parts(rest))


def here() -> str:
    """What releases for this device must be for."""
    return f"cp{sys.version_info.major}{sys.version_info.minor}-{machine.machine().lower()}"


def fitting(files: Iterable[File], platform: str) -> list[File]:
    """The files that a device takes: of each distribution all that fit it; pip chooses among them.

    Raises:
        WireError: a distribution has none, so that the rest is of no use there.
    """
    taken: dict[str, list[File]] = {}
    for file in files:
        found = _WHEEL.match(file.name)
        if found is None:
            raise WireError(f"{file.name} is not called as a wheel is: name-version-python-abi-platform.whl")
        fits = _fits(found[3].split("."), found[4].split("."), found[5].split("."), platform)
        taken.setdefault(found[1].lower().replace(".", "_"), []).extend([file] if fits else [])
    if DISTRIBUTION not in taken:
        raise WireError(f"the release has no wheel of {DISTRIBUTION}; it has {', '.join(sorted(taken))}")
    lacking = sorted(name for name, some in taken.items() if not some)
    if lacking:
        raise WireError(f"no wheel of {', '.join(lacking)} fits {platform}")
    return [file for some in taken.values() for file in some]


def versions(names: Iterable[str]) -> set[str]:
    """The versions of `DISTRIBUTION` among files."""
    found = (_WHEEL.match(name) for name in names)
    return {one[2] for one in found if one is not None and one[1].lower() == DISTRIBUTION}


def _fits(pythons: list[str], abis: list[str], places: list[str], platform: str) -> bool:
    own, _, processor = platform.partition("-")
    major, minor = own[2:3], int(own[3:] or 0)
    placed = any(
        place == "any" or (place.startswith(("linux", "manylinux")) and place.endswith(processor)) for place in places
    )
    older = [int(one[3:]) for one in pythons if re.fullmatch(rf"cp{major}[0-9]+", one)]
    if "abi3" in abis:
        return placed and any(one <= minor for one in older)
    return placed and (own in pythons or f"py{major}" in pythons or f"py{major}{minor}" in pythons)


def _parts(rest: str) -> Iterator[tuple[int, str]]:
    for part in re.findall(r"[0-9]+|[a-z]+", rest.lower()):
        yield (int(part), "") if part.isdigit() else (-1, part)


def _covered(record: bytes) -> bytes:
    return msgspec.msgpack.encode([_DOMAIN, record])

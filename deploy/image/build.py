"""`fedge flash --build`: the image that every card of a fleet begins with, kept while its parts stay."""

import hashlib
import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.image import card, layer, release
from deploy.image.bootstrap import Base, ensure, sources

BOARDS = "Raspberry Pi 3, 3+, 4, 400, Zero 2 W and the compute modules 3 and 4"
NOT_FOR = (
    "a Raspberry Pi 5 does not boot it, as Debian 12's kernel knows nothing of one, and some Zero 2 W (wifi chip "
    "BCM43430/2) have no wifi with it, as Debian 12 lacks the chip's firmware: "
    "give fedge flash an image of Raspberry Pi OS Lite (64-bit) for those"
)


def build(
    wheels: Sequence[Path],
    *,
    cache: Path,
    mirror: str | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """The image of a card with the client of these wheels (for aarch64 and Python 3.11), of no device yet.

    Args:
        wheels: fedge's and those of all that it needs; other files among them, and pip's, are left out.
        cache: where it, and the system's files that it is made of, are kept.
        mirror: a Debian archive's URL, in the place of those that this machine's apt has.
        log: is told what is done.

    Raises:
        ConfigError: this machine lacks what it takes, or packages or wheels are not to be had; says which.
    """
    wheels = sorted(one for one in wheels if one.suffix == ".whl" and not one.name.startswith("pip-"))
    base = Base(sources(mirror))
    parts = [base.key(), *map(inspect.getsource, (layer, release, card))]
    parts += [f"{wheel.name} {hashlib.sha256(wheel.read_bytes()).hexdigest()}" for wheel in wheels]
    device = layer.Layer()
    release.service(device)
    key = hashlib.sha256("\n".join([*parts, device.digest()]).encode()).hexdigest()
    image = cache / f"fedge-{release.version(wheels)}-{key[:16]}.img"
    if image.exists():
        log(f"what the image is made of is unchanged: {image}")
        return image
    system = ensure(base, cache, log)
    log(f"putting fedge {release.version(wheels)} and the system together")
    with tempfile.TemporaryDirectory(dir=cache) as place:
        scratch = Path(place)
        release.release(device, wheels, scratch)
        client, made = scratch / "client.tar", scratch / "card.img"
        client.write_bytes(device.pack())
        card.assemble(made, [system, client], scratch)
        made.replace(image)
    log(f"{image}: {image.stat().st_size >> 20} MiB, for {BOARDS}; {NOT_FOR}")
    return image

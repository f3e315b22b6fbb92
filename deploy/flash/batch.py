"""Several cards in one go: a name and a claim for each, and a note of which are done."""

import os
from dataclasses import dataclass
from pathlib import Path

from edge_client.errors import ConfigError, FlashError
from edge_client.trust.claim import SUFFIX

WRITTEN = "written"
"""The folder in that of the claims to which those go that are on a card: one that is used again is refused."""


@dataclass(frozen=True)
class Card:
    """A card that is to be written."""

    name: str
    claim: Path | None = None
    aside: Path | None = None
    """Where the claim goes when the card is written; None where it stays."""

    def done(self) -> None:
        """Note that it is written.

        Raises:
            FlashError: the claim cannot be put aside.
        """
        if self.claim is None or self.aside is None:
            return
        try:
            self.aside.parent.mkdir(mode=0o700, exist_ok=True)
            os.replace(self.claim, self.aside)
        except OSError as error:
            raise FlashError(
                f"the card for {self.name} is written, but {self.claim} cannot be moved to {self.aside} "
                f"({error.strerror}): move it, so that it does not get onto another card"
            ) from error


def plan(hostname: str, count: int | None, claim: Path | None, claims: Path | None) -> list[Card]:
    """The cards that are still to be written: one called ``hostname``, or ``hostname-1`` to ``hostname-count``.

    Those whose claims were put aside are done: the same command, said again, goes on.

    Raises:
        ConfigError: there are fewer claims than cards, or claims were named in two ways.
    """
    if claim is not None and claims is not None:
        raise ConfigError("--claim and --claims: a file for one card, or a folder of them; name one of the two")
    if claim is not None and (count or 1) > 1:
        raise ConfigError(f"--count {count}: one --claim is good for one device; name a folder of them with --claims")
    names = [hostname] if count is None else [f"{hostname}-{number}" for number in range(1, count + 1)]
    if claims is None:
        return [Card(name, claim) for name in names]
    if not claims.is_dir():
        raise ConfigError(
            f"--claims {claims} is no folder; expected that which `fedge claim --count {len(names)}` made"
        )
    aside = {name: claims / WRITTEN / f"{name}{SUFFIX}" for name in names}
    left = [name for name in names if not aside[name].exists()]
    files = sorted(claims.glob(f"*{SUFFIX}"))
    if len(files) < len(left):
        raise ConfigError(
            f"{claims} has {len(files)} claims for {len(left)} cards; make more: fedge claim --count "
            f"{len(left) - len(files)} -o {claims}"
        )
    return [Card(name, file, aside[name]) for name, file in zip(left, files, strict=False)]

"""What came of an attack."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """One attack that was carried out.

    ``where``: who had to refuse it. ``evidence``: the line that was logged or told, or what was heard and measured.
    """

    attack: str
    refused: bool
    where: str
    evidence: str

    def shown(self) -> dict[str, Any]:
        """As it is written to the results."""
        return {
            "attack": self.attack,
            "refused": self.refused,
            "where": self.where,
            "evidence": self.evidence,
        }

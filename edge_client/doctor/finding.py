"""What an examination found: one fact, what it means for fedge, what to do about it."""

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

Level = Literal["good", "note", "bad"]


class Finding(msgspec.Struct, frozen=True):
    """One fact. ``bad`` means that fedge will not work; ``note`` that it will, and that something is worth knowing."""

    name: str
    level: Level
    found: str
    advice: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings about one subject: a device, or the broker at an address."""

    subject: str
    works: bool
    findings: tuple[Finding, ...]
    chunk: int | None = None
    """Bytes in the chunks that fit the broker; None where that was not measured."""


def report(subject: str, findings: Iterable[Finding], chunk: int | None = None) -> Report:
    """The report on ``subject``: it works where nothing is bad."""
    found = tuple(findings)
    return Report(subject, all(one.level != "bad" for one in found), found, chunk)


def tell(reports: Iterable[Report], say: Callable[[str], None]) -> None:
    """Say it in lines for a reader: every finding, then what to do, then whether fedge works."""
    for one in reports:
        say(one.subject)
        width = max(len(finding.name) for finding in one.findings)
        for finding in one.findings:
            say(f"  {finding.level:4}  {finding.name:{width}}  {finding.found}")
        for finding in one.findings:
            if finding.advice:
                say(f"  {'must' if finding.level == 'bad' else 'may'}: {finding.advice}")
        say(f"  {'fedge works here.' if one.works else 'fedge does NOT work here.'}")


def to_json(reports: Iterable[Report]) -> str:
    """The same for a program: a list of reports."""
    return msgspec.json.format(msgspec.json.encode(list(reports)), indent=2).decode()

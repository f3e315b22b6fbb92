"""Says whether a release may be installed; the updater runs it with the client that is installed and has proved itself.

It reads a JSON object from standard input, and writes one. Everything that is asked about comes from files of root's:
what the client's user has staged was copied before.
"""

import hashlib
import sys
from pathlib import Path

import msgspec

from edge_client.errors import WireError
from edge_client.trust.keys import verify
from edge_client.trust.release import admit, claimed, fitting, unseal
from edge_client.wire.messages import Release


class Question(msgspec.Struct, frozen=True):
    """What is asked: a file with a release, and what is known on the device; times in seconds since 1970."""

    signed: str
    federation: str
    pins: list[str]
    """The federation's public keys, in hexadecimal digits."""
    platform: str
    running: str
    newest: float
    now: float


class Answer(msgspec.Struct, frozen=True):
    """What is said: why not, or all that there is to install."""

    record: str
    version: str
    error: str = ""
    issued: float = 0.0
    pins: tuple[str, ...] = ()
    files: tuple[tuple[str, str, int], ...] = ()
    """Name, SHA-256 and size of each wheel."""


def answer(question: Question) -> Answer:
    """Whether a release may be installed."""
    pins = [bytes.fromhex(pin) for pin in question.pins]
    data = Path(question.signed).read_bytes()
    try:
        release = msgspec.msgpack.decode(data, type=Release)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Answer(hashlib.sha256(data).hexdigest(), "", f"not a release: {error}")
    name = hashlib.sha256(release.record).hexdigest()
    try:
        record = unseal(release, question.federation, lambda said, by: any(verify(pin, said, by) for pin in pins))
        admit(record, now=question.now, running=question.running, newest=question.newest)
        files = fitting(record.files, question.platform)
    except WireError as error:
        return Answer(name, claimed(release), str(error))
    return Answer(
        name,
        record.version,
        issued=record.issued,
        pins=tuple(pin.hex() for pin in record.pins),
        files=tuple((file.name, file.blob.sha256.hex(), file.blob.size) for file in files),
    )


def main() -> None:
    """Answer one question."""
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    sys.stdout.buffer.write(msgspec.json.encode(answer(question)))


if __name__ == "__main__":
    main()

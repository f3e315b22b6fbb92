"""A coverage-guided fuzzer of the decoders of messages and of the codec, by atheris: ``make fuzz`` (``SECONDS=600``).

What it finds is written to ``build/fuzz/crash-*``; run this file with such a file's path to see it again.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_client.codec", "edge_client.wire"]):
    from edge_client.errors import WireError
    from edge_client.wire import messages
    from tests.edge_client.codec import hostile
    from tests.edge_client.wire.test_messages import EXAMPLES

NAMES = sorted(hostile.DECODERS)


def one(data: bytes) -> None:
    """The first byte chooses the decoder."""
    if data and (number := data[0] % (len(NAMES) + 1)) < len(NAMES):
        hostile.feed(NAMES[number], data[1:])
    elif data:
        message(data[1:])


def message(data: bytes) -> None:
    """A payload is a WireError, or a message that can be said again."""
    try:
        found = messages.decode(data)
    except WireError:
        return
    assert messages.decode(messages.encode(found)) == found


def main() -> None:
    """Fuzz from the valid files of each decoder."""
    corpus = Path("build/fuzz/corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        for place, data in enumerate(hostile.seeds()[name]):
            (corpus / f"{name}-{place}").write_bytes(bytes([number]) + data)
    for place, example in enumerate(EXAMPLES):
        (corpus / f"message-{place}").write_bytes(bytes([len(NAMES)]) + messages.encode(example))
    again = any(Path(argument).is_file() for argument in sys.argv[1:])
    limits = ["-max_len=20000", "-rss_limit_mb=1000", "-timeout=10", "-artifact_prefix=build/fuzz/"]
    atheris.Setup([*sys.argv, *limits, *([] if again else [str(corpus)])], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

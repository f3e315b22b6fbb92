"""A coverage-guided fuzzer of the codec's decoders, by atheris: ``make fuzz`` (``SECONDS=600`` for longer).

What it finds is written to ``build/fuzz/crash-*``; run this file with such a file's path to see it again.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_client.codec"]):
    from tests.edge_client.codec import hostile

NAMES = sorted(hostile.DECODERS)


def one(data: bytes) -> None:
    """The first byte chooses the decoder."""
    if data:
        hostile.feed(NAMES[data[0] % len(NAMES)], data[1:])


def main() -> None:
    """Fuzz from the valid files of each decoder."""
    corpus = Path("build/fuzz/corpus")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        for place, data in enumerate(hostile.seeds()[name]):
            (corpus / f"{name}-{place}").write_bytes(bytes([number]) + data)
    again = any(Path(argument).is_file() for argument in sys.argv[1:])
    limits = ["-max_len=20000", "-rss_limit_mb=1000", "-timeout=10", "-artifact_prefix=build/fuzz/"]
    atheris.Setup([*sys.argv, *limits, *([] if again else [str(corpus)])], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""What a long benchmark has measured so far, kept on disk: an interrupted run resumes from it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federations import write_json


class Parts:
    """Measurements by name, each made once; another key (machine, version, plan) begins anew."""

    def __init__(self, path: Path, key: dict[str, Any], *, fresh: bool) -> None:
        self.path = path
        self.key = json.loads(json.dumps(key))
        kept = json.loads(path.read_text()) if path.exists() and not fresh else {}
        self.done: dict[str, Any] = kept["done"] if kept.get("key") == self.key else {}

    def get(self, name: str, measure: Callable[[], Any], *, say: Callable[[Any], str]) -> Any:
        """The measurement, made now where it is not there; one that fails raises and is not kept."""
        if name not in self.done:
            start = time.monotonic()
            self.done[name] = measure()
            write_json(self.path, {"key": self.key, "done": self.done})
            print(f"{name}: {say(self.done[name])} ({time.monotonic() - start:.0f} s)", flush=True)
        return self.done[name]

    def forget(self, name: str) -> None:
        """Measure this one again."""
        self.done.pop(name, None)

    def end(self) -> None:
        """Forget everything: the results are written."""
        self.path.unlink(missing_ok=True)

"""Where several processes run the tests (``pytest -n 2``): what stays together, and what comes first."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
RULES = "tests of rules"
LONGEST = (
    "tests/test_readme.py",
    RULES,
    "tests/export/test_architectures.py",
    "tests/test_end_to_end.py",
    "tests/faults/test_mutations.py",
    "tests/test_install.py",
    "tests/test_demo.py",
)
"""What takes longest comes first, so that none of it is left when everything else is done."""


@cache
def rule_tests() -> frozenset[Path]:
    """The files whose tests hold gradient rules to PyTorch, and the one that asks whether all of them were."""
    files = (ROOT / "tests" / "export").rglob("test_*.py")
    return frozenset(path for path in files if "tests.export.autograd" in path.read_text(encoding="utf-8"))


def group(file: Path) -> str:
    """A file's tests share what they export; those of gradient rules, in whatever file, the record of rules tried."""
    return RULES if file in rule_tests() else file.relative_to(ROOT).as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group(item.path), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling":
    # Its own groups do nothing with pytest 9.2: https://github.com/pytest-dev/pytest-xdist/issues/1386
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(ROOT / nodeid.partition("::")[0])

    return Groups(config, log)

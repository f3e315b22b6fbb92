"""Where several processes run the tests (``pytest -n 2 --dist loadgroup``): what stays together, what comes first."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
RULES = "rules"
LONGEST = (
    "test_readme.py",
    RULES,
    "export/test_architectures.py",
    "test_install.py",
)
"""Groups that take minutes, longest first, so that none of them is left when all others are done."""


def group(item: pytest.Item) -> str:
    """A file's tests share what they export; those of gradient rules, in whatever file, the record of rules tried."""
    names = vars(item.module)  # type: ignore[attr-defined]
    if "assert_gradients" in names or "EXERCISED" in names:
        return RULES
    return item.path.relative_to(HERE).as_posix()


# First, because xdist reads the marks in this hook too.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups = {item: group(item) for item in items}
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(groups[item]))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(groups[item], len(order)))

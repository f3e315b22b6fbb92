"""Order of the tests: files that take minutes come first, so that none of them is left when others are done."""

from pathlib import Path

import pytest

LONGEST = (
    "test_readme.py",
    "test_install.py",
    "test_chaos.py",
    "test_nats_cluster.py",
    "test_broker.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, the others in their order after them."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(Path(item.path).name, len(order)))

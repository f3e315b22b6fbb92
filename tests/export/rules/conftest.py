"""Order: what every rule's test left behind is looked at last."""

import pytest

LAST = "test_every_rule.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == LAST)

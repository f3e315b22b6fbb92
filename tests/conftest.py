"""Order of the tests, and what stays together where several processes run them (``pytest -n 2 --dist loadgroup``)."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXPORT = HERE / "export"
LONGEST = ("test_readme.py", "export", "test_install.py", "test_nats_cluster.py", "test_demo.py")
"""Groups that take minutes come first, so that none of them is left when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share what they export; those of the export know from one another which rules were tried."""
    order = {name: place for place, name in enumerate(LONGEST)}

    def group(item: pytest.Item) -> str:
        path = Path(item.path)
        return "export" if path.is_relative_to(EXPORT) else str(path.relative_to(HERE))

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: order.get(Path(group(item)).name, len(order)))

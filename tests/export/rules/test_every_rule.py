"""Every rule of the tables was held to PyTorch by some test, all of which ran in this process before this one.

Where several processes run the tests, `tests/conftest.py` keeps these together; ``--dist loadgroup`` heeds it.
"""

from pathlib import Path

import pytest

from export.bundle import RULES
from tests.export.autograd import EXERCISED


def test_every_rule_has_a_test(request: pytest.FixtureRequest) -> None:
    tests = Path(__file__).parents[1].rglob("test_*.py")
    needed = {path for path in tests if "assert_gradients" in path.read_text(encoding="utf-8")}
    collected = {item.path for item in request.session.items}
    partial = request.config.option.keyword or request.config.option.markexpr
    if partial or not collected >= needed or any("::" in argument for argument in request.config.args):
        pytest.skip("only where all tests of rules run")
    assert sorted(set(RULES) - EXERCISED) == []

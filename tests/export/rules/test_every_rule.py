"""Every rule of the tables was held to PyTorch by some test, all of which ran in this process before this one.

Where several processes run the tests, `tests/conftest.py` keeps these in one.
"""

import pytest

from export.bundle import RULES
from tests.conftest import rule_tests
from tests.export.autograd import EXERCISED


def test_every_rule_has_a_test(request: pytest.FixtureRequest) -> None:
    collected = {item.path for item in request.session.items}
    partial = request.config.option.keyword or request.config.option.markexpr
    if partial or not collected >= rule_tests() or any("::" in argument for argument in request.config.args):
        pytest.skip("only where all tests of rules run")
    assert sorted(set(RULES) - EXERCISED) == []

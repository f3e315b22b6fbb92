"""Every rule of the tables was held to PyTorch by some test beside this one, which runs after them."""

from pathlib import Path

import pytest

from export.bundle import RULES
from tests.export.autograd import EXERCISED


def test_every_rule_has_a_test(request: pytest.FixtureRequest) -> None:
    here = Path(__file__).parent
    collected = {item.path for item in request.session.items}
    partial = request.config.option.keyword or request.config.option.markexpr
    if partial or not collected >= set(here.glob("test_*.py")) or any("::" in a for a in request.config.args):
        pytest.skip("only where all tests of rules run")
    assert sorted(set(RULES) - EXERCISED) == []

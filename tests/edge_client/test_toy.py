"""The toy bundle keeps the manifest's contract: every other test rests on it."""

import pytest

from tests.toy import toy_bundle


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden": 5}, {"momentum": True}, {"proximal": True}, {"frozen": True, "buffer": True, "hidden": 2}],
)
def test_toy_is_deterministic(options):
    assert toy_bundle(**options) == toy_bundle(**options)

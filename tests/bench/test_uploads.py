"""Server and broker stay small while many clients upload at once: the benchmark, in small."""

import importlib.util
import sys
from pathlib import Path

import pytest

from broker_server.broker import find_mosquitto

FOLDER = Path(__file__).parent


@pytest.fixture
def uploads(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("fedge_bench_uploads", FOLDER / "uploads.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
def test_memory_is_that_of_the_places_and_not_of_the_clients(uploads):
    found = uploads.measure(clients=30, size=1_500_000, uploads=2, limit=90)
    everything = found["clients"] * found["update_bytes"] / 2**20
    assert everything > 40
    assert found["most_at_once"] == 2
    assert found["broker_peak_mib"] - found["broker_before_mib"] < everything / 4
    assert found["server_peak_mib"] - found["server_before_mib"] < everything / 2
    assert found["sent_per_byte"] < 1.2

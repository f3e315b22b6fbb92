"""Results in MLflow and in TensorBoard, where they are installed."""

import json
import struct

import pytest

from broker_server.sweep.figures import rows, swept
from broker_server.sweep.runs import Run, plan
from broker_server.sweep.tracking import check_trackers, to_mlflow, to_tensorboard
from edge_client.errors import ConfigError
from tests.broker_server.sweep.files import federation, result

LEARNED = result(({"accuracy": 0.4, "loss": None}, 10, 20, 1.0), ({"accuracy": 0.7, "loss": 1.0}, 11, 21, 2.0))


@pytest.fixture
def done(tmp_path):
    planned = plan(federation(tmp_path), [Run("one", {"train.hypers.lr": 0.1, "codec.clients": {"pi-*": 0.1}}, 5)])
    results = {"one": {"run": {"fingerprint": planned[0].fingerprint}, **LEARNED}}
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "result.json").write_text(json.dumps(results["one"]))
    return rows(planned, results), results, swept(planned)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("broker_server.sweep.results.find_spec", lambda name: None)
    for name, package in (("mlflow", "mlflow"), ("tensorboard", "tensorboardX")):
        with pytest.raises(ConfigError, match=f"--track {name} needs {package}, .* pip install {package}"):
            check_trackers([name])


def test_mlflow_has_settings_and_metrics_by_round_once(tmp_path, done):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    address = to_mlflow(tmp_path, "toys", *done)
    assert to_mlflow(tmp_path, "toys", *done) == address
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("toys").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert run.data.params["train.hypers.lr"] == "0.1"
    assert run.data.params["seed"] == "5"
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.4), (2, 0.7)]
    assert history[1].timestamp - history[0].timestamp in (1999, 2000, 2001)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [2]
    done[1]["one"]["run"]["fingerprint"] = "another"
    to_mlflow(tmp_path, "toys", *done)
    (again,) = client.search_runs([experiment])
    assert again.info.run_id != run.info.run_id


def test_tensorboard_has_settings_and_metrics_by_round(tmp_path, done):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    for _ in range(2):
        place = to_tensorboard(tmp_path, "toys", *done)
    found, tags = [], set()
    for path in (tmp_path / "tensorboard" / "one").iterdir():
        assert str(path).startswith(place)
        data = path.read_bytes()
        # Length, its checksum, the event, its checksum.
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            found += [(event.step, v.tag, round(v.simple_value, 6)) for v in event.summary.value]
            tags |= {value.tag for value in event.summary.value}
    assert [one for one in found if one[1] == "accuracy"] == [(1, "accuracy", 0.4), (2, "accuracy", 0.7)]
    assert [one for one in found if one[1] == "loss"] == [(2, "loss", 1.0)]
    assert {"_hparams_/session_start_info", "best", "last"} <= tags

import msgspec
import pytest

from broker_server.aggregation import registry
from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.optimizer import ServerOptimizer
from broker_server.aggregation.streaming import Aggregator
from edge_client.bundle import Bundle
from edge_client.errors import ConfigError
from tests.toy import toy_bundle


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_every_algorithm_can_be_made_with_its_defaults(name):
    chosen = registry.algorithm(name)
    options = registry.options(chosen.options, {}, "aggregation.options")
    made = chosen.make(options, LocalTraining())
    assert isinstance(made, Aggregator | CohortAggregator)
    assert chosen.buffered <= isinstance(made, Aggregator), "a rule over all updates needs them of one version"
    assert chosen.fewest(options) >= 1


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_every_optimizer_can_be_made_with_its_defaults(name):
    chosen = registry.optimizer(name)
    assert isinstance(chosen.make(registry.options(chosen.options, {}, "server.options")), ServerOptimizer)


def test_one_of_one_s_own_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_rules.py").write_text(
        "from tests.broker_server.aggregation.own_algorithm import BY_LOSS as MINE\nOTHER = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    mine = registry.algorithm("my_own_rules:MINE")
    assert registry.options(mine.options, {"power": 2}, "aggregation.options") == mine.options(power=2)
    with pytest.raises(ConfigError, match=r"aggregation\.options\.power is 5; expected a number from 0 to 4"):
        registry.options(mine.options, {"power": 5}, "aggregation.options")
    with pytest.raises(ConfigError, match="which is a int; expected a Algorithm"):
        registry.algorithm("my_own_rules:OTHER")
    with pytest.raises(ConfigError, match=r"AttributeError: .*; expected one of"):
        registry.algorithm("my_own_rules:NONE")


def test_local_training_is_the_bundle_s_with_the_plan_s_hypers():
    plain = Bundle.from_bytes(toy_bundle(momentum=True, proximal=True)).manifest
    assert plain.optimizer.name == "sgd"
    assert LocalTraining.of(plain, {"lr": 0.5}) == LocalTraining("sgd", 0.5, 0.0, 0.01)
    nesterov = msgspec.structs.replace(plain, optimizer=msgspec.structs.replace(plain.optimizer, name="nesterov"))
    assert LocalTraining.of(nesterov, {"momentum": 0.5, "mu": 0.0}) == LocalTraining("nesterov", 0.1, 0.5, 0.0)
    with pytest.raises(ConfigError, match=r"train\.hypers\.lr is 0; qfedavg expects a learning rate above 0"):
        registry.algorithm("qfedavg").make(registry.algorithm("qfedavg").options(), LocalTraining.of(plain, {"lr": 0}))

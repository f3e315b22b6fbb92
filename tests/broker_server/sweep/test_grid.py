"""A sweep file, and the runs that it stands for."""

import pytest

from broker_server.sweep.grid import Sweep, Variant, expand, read_sweep
from edge_client.errors import ConfigError

TOML = """\
seeds = [0, 2]

[grid]
"train.hypers.lr" = [0.03, 0.1]

[[runs]]
name = "fedavg"

[[runs]]
name = "fedprox"
"train.epochs" = 2
grid = { "train.hypers.mu" = [0.1, 1.0] }
"""


@pytest.fixture
def read(tmp_path):
    def of(text: str) -> Sweep:
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return read_sweep(path)

    return of


def test_values_are_crossed_with_alternatives_and_seeds(read):
    runs = expand(read(TOML))
    assert [run.name for run in runs] == [
        "fedavg-lr=0.03-seed=0",
        "fedavg-lr=0.03-seed=2",
        "fedavg-lr=0.1-seed=0",
        "fedavg-lr=0.1-seed=2",
        *(f"fedprox-lr={lr}-mu={mu}-seed={seed}" for lr in (0.03, 0.1) for mu in (0.1, 1.0) for seed in (0, 2)),
    ]
    assert runs[-1].settings == {"train.epochs": 2, "train.hypers.lr": 0.1, "train.hypers.mu": 1.0}
    assert (runs[-1].seed, runs[-1].variant) == (2, "fedprox")


def test_a_key_says_the_same_in_quotes_without_and_below_a_head(read):
    quoted = read('[grid]\n"train.hypers.lr" = [1.0]\n[[runs]]\nname = "a"\n"stop.rounds" = 3')
    plain = read('[grid]\ntrain.hypers.lr = [1.0]\n[[runs]]\nname = "a"\nstop.rounds = 3')
    below = read('[grid.train.hypers]\nlr = [1.0]\n[[runs]]\nname = "a"\n[runs.stop]\nrounds = 3')
    assert quoted == plain == below


def test_what_an_alternative_says_replaces_what_is_tried_with_all():
    shared = {"train.hypers.lr": [0.1, 0.2]}
    own = (Variant("fixed", {"train.hypers.lr": 9.0}), Variant("other", grid={"train.hypers.lr": [0.5]}))
    assert [run.settings for run in expand(Sweep(grid=shared, variants=own))] == [
        {"train.hypers.lr": 9.0},
        {"train.hypers.lr": 0.5},
    ]


def test_without_seeds_the_federation_files_own_is_taken(read):
    assert [run.seed for run in expand(read("[grid]\ntrain.epochs = [1, 2]"), seed=7)] == [7, 7]


def test_names_do_not_hang_on_other_values_alternatives_or_seeds(read):
    more = TOML.replace("[0, 2]", "[0, 1, 2]").replace("[0.03, 0.1]", "[0.3, 0.1, 0.03]").replace('"fedavg"', '"sgd"')
    names = [{run.name for run in expand(read(text))} for text in (TOML, more)]
    assert {name for name in names[0] if name.startswith("fedprox")} < names[1]


def test_names_tell_keys_and_values_apart():
    values = ["a/b", "a b", "x" * 50, "x" * 51, True, "[1]", [1, 2]]
    runs = expand(Sweep(grid={"simulation.key": values, "evaluation.every": [1], "server.schedule.every": [2]}))
    assert len({run.name for run in runs}) == len(values)
    assert all("-evaluation.every=1-server.schedule.every=2-seed=0" in run.name for run in runs)
    assert {"/", " ", "["}.isdisjoint("".join(run.name for run in runs))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = 1", ["seed is not a known key", "seeds, grid, runs"]),
        ("seeds = []", ["seeds is []", "[0, 1, 2]"]),
        ("seeds = [1, 1]", ["seeds is [1, 1]", "different"]),
        ("seeds = [true]", ["seeds is [True]"]),
        ("seeds = [-1]", ["seeds is [-1]"]),
        ("grid = 3", ["grid is 3"]),
        ("[grid]\ntrain.epochs = 3", ["grid: train.epochs is 3", "a list"]),
        ("[grid]\ntrain.epochs = []", ["train.epochs is []"]),
        ("[grid]\ntrain.epochs = [1, 1]", ["train.epochs is [1, 1]", "once"]),
        ("[[runs]]\ntrain.epochs = 1", ["name of [[runs]] is ''"]),
        ('[[runs]]\nname = "../x"', ["name of [[runs]] is '../x'"]),
        ('[[runs]]\nname = "a"\n[[runs]]\nname = "a"', ['"a"', "two of [[runs]]"]),
        ('[[runs]]\nname = "a"\ngrid.train.epochs = 1', ["grid of run a: train.epochs is 1"]),
        ("[runs]\na = 1", ["[[runs]]"]),
        ("runs = []", ["[[runs]]"]),
        ("[grid", ["is not TOML"]),
    ],
)
def test_mistakes_name_the_key_and_what_is_possible(read, text, words):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert all(word in str(caught.value) for word in ("sweep.toml: ", *words))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sweep(tmp_path / "none.toml")

"""Results as files and as a table."""

import csv

import pytest
from rich.console import Console

from broker_server.sweep.results import summary_table, write_csv, write_parquet
from edge_client.errors import ConfigError

ROWS = [
    {"name": "a", "seed": 0, "train.hypers.lr": 0.1, "key": "x, y", "last": 0.123456789012345678, "to": None},
    {"name": "b", "seed": 1, "train.hypers.lr": 1, "key": True, "last": 0.5, "to": 3},
]


def line(variant, lr, runs=3, reached=0, **means):
    known = {"best": (0.5, 0.1), "last": (0.4, 0.1), "bytes_up": (2e3, 1.0), "bytes_down": (3e6, 1.0)}
    known |= {"rounds_to_target": (None, None), "bytes_to_target": (None, None)} | means
    figures = {f"{name}_mean": mean for name, (mean, _) in known.items()}
    figures |= {f"{name}_std": deviation for name, (_, deviation) in known.items()}
    return {"variant": variant, "lr": lr, "metric": "accuracy", "runs": runs, "reached": reached, **figures}


def shown(*lines, higher=True):
    console = Console(width=140, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as said:
        console.print(summary_table(lines, ("lr",), higher_is_better=higher))
    return [[cell.strip() for cell in row.split("│")[1:-1]] for row in said.get().splitlines() if "│" in row]


def test_csv_has_every_digit_and_nothing_where_there_is_no_value(tmp_path):
    write_csv(tmp_path / "results.csv", ROWS)
    with (tmp_path / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(ROWS[0])
    assert float(found[0]["last"]) == ROWS[0]["last"]
    assert (found[0]["key"], found[0]["to"], found[1]["to"]) == ("x, y", "", "3")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_csv_of_nothing(tmp_path):
    write_csv(tmp_path / "results.csv", [])
    assert (tmp_path / "results.csv").read_text() == "name\n"


def test_the_best_mean_of_each_column_is_marked():
    table = shown(line("fedavg", 0.1), line("fedavg", 0.2, best=(0.75, 0.05), last=(0.3, None)))
    assert table == [
        ["fedavg lr=0.1", "3", "0.5000 ± 0.1000", "0.4000 ± 0.1000 *", "2.00 kB", "3.00 MB"],
        ["fedavg lr=0.2", "3", "0.7500 ± 0.0500 *", "0.3000", "2.00 kB", "3.00 MB"],
    ]


def test_of_losses_the_lowest_is_marked():
    table = shown(line("", 0.1), line("", 0.2, best=(0.75, 0.05)), higher=False)
    assert [row[0] for row in table] == ["lr=0.1", "lr=0.2"]
    assert [row[2][-1] for row in table] == ["*", "0"]


def test_rounds_to_the_target_are_compared_where_all_runs_reached_it():
    few = line("few", 0.1, reached=1, rounds_to_target=(3.0, None), bytes_to_target=(1e3, None))
    all_ = line("all", 0.1, reached=3, rounds_to_target=(7.5, 0.5), bytes_to_target=(2e3, 10.0))
    slow = line("slow", 0.1, reached=3, rounds_to_target=(9.0, 0.5), bytes_to_target=(1.5e3, 10.0))
    assert [row[3:] for row in shown(few, all_, slow)] == [
        ["1/3", "3", "1.00 kB"],
        ["3/3", "7.5 ± 0.5 *", "2.00 kB ± 10 B"],
        ["3/3", "9 ± 0.5", "1.50 kB ± 10 B *"],
    ]


def test_parquet_has_the_same_lines(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    write_parquet(tmp_path / "results.parquet", ROWS)
    table = parquet.read_table(tmp_path / "results.parquet")
    assert table.to_pylist() == [
        {**ROWS[0], "train.hypers.lr": 0.1},
        {**ROWS[1], "train.hypers.lr": 1.0, "key": "True"},
    ]


def test_parquet_without_pyarrow_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("broker_server.sweep.results.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--parquet needs pyarrow.*pip install pyarrow"):
        write_parquet(tmp_path / "results.parquet", ROWS)

import numpy as np
import pytest

from broker_server.aggregation.gathering import Gathered
from broker_server.aggregation.optimizer import ServerOptimizer, adaptive, chain, scale_by, trace
from broker_server.config import Codec
from broker_server.ledger import BEST, Ledger
from broker_server.publication import Publication
from broker_server.records import Round, Task
from edge_client.bundle import Bundle
from edge_client.codec.model import encode_model_delta
from edge_client.codec.versions import CodedState, apply_delta
from edge_client.errors import LedgerError
from tests.toy import toy_bundle

CODECS = [Codec(), Codec(model_step=1.0), Codec(kind="none")]
BUNDLE = Bundle.from_bytes(toy_bundle(features=10, classes=8, hidden=12))
SIZE = BUNDLE.layout.size


def sgd(rate: float = 1.0, momentum: float = 0.0) -> ServerOptimizer:
    return chain(trace(momentum), scale_by(lambda _: rate))


OPTIMIZERS = {
    "fedavg": sgd(),
    "momentum": sgd(1.0, 0.9),
    "yogi, falling": chain(adaptive("yogi", 0.9, 0.99, 1e-3), scale_by(lambda count: 0.01 / (count + 1))),
}


def open_ledger(folder) -> Ledger:
    return Ledger.open(folder / "ledger.db", federation="toys", bundle=BUNDLE.digest)


def steps(count: int, seed: int = 0, scale: float = 0.01):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale * 0.7**n, SIZE).astype(np.float32) for n in range(count)]


def advance(publication: Publication, ledger: Ledger, aggregate, keep=()) -> int:
    number = publication.version + 1
    task = Task(
        epoch=1,
        task=number,
        round=number,
        kind="train",
        version=publication.version,
        cohort=("a",),
        plan=b"",
        opened=0.0,
    )
    ledger.open_task(task)
    result = Round(
        round=number, version=number, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0, metrics={}
    )
    return publication.advance(Gathered(aggregate), result, closes=[(1, number)], keep=keep)


@pytest.fixture
def ledger(tmp_path):
    with open_ledger(tmp_path) as opened:
        yield opened


def test_version_0_is_the_bundle(ledger):
    publication = Publication(BUNDLE, ledger, Codec(), sgd())
    assert publication.version == 0
    np.testing.assert_array_equal(publication.parameters(), BUNDLE.initial())


@pytest.mark.parametrize("codec", CODECS, ids=["coarse", "fine", "none"])
def test_what_rounding_leaves_out_is_never_lost(ledger, codec):
    publication = Publication(BUNDLE, ledger, codec, sgd())
    total = BUNDLE.initial().astype(np.float64)
    for step in steps(12):
        advance(publication, ledger, step)
        total += step
        stored = ledger.latest()
        assert stored is not None
        left = np.frombuffer(stored.remainder, "<f4") if stored.remainder else np.zeros(SIZE, np.float32)
        np.testing.assert_allclose(publication.parameters() + left, total, rtol=0, atol=2e-6)
    if codec.kind == "quantized":
        left = np.square(total - publication.parameters()).sum()
        assert left <= 1.1 * codec.model_noise * np.square(total - BUNDLE.initial()).sum()


@pytest.mark.parametrize("codec", CODECS, ids=["coarse", "fine", "none"])
def test_a_delta_from_any_version_leads_to_the_same_bits(ledger, codec):
    publication = Publication(BUNDLE, ledger, codec, sgd())
    states = {0: CodedState(BUNDLE.layout)}
    for step in steps(11):
        held = publication.version
        advance(publication, ledger, step, keep=range(20))
        states[publication.version] = apply_delta(states[held], publication.delta(held), BUNDLE.layout)
        assert states[publication.version].digest() == publication.digest
    for held, state in states.items():
        if held == publication.version:
            continue
        reached = apply_delta(state, publication.delta(held), BUNDLE.layout)
        assert reached.digest() == publication.digest
        np.testing.assert_array_equal(reached.parameters(BUNDLE.initial()), publication.parameters())


@pytest.mark.parametrize("codec", CODECS, ids=["coarse", "fine", "none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_restart_gives_the_same_bits(tmp_path, codec, optimizer):
    with_restarts, without = tmp_path / "a", tmp_path / "b"
    walk = [step for seed in range(4) for step in steps(6, seed)]  # over several anchors
    with open_ledger(without) as ledger:
        publication = Publication(BUNDLE, ledger, codec, optimizer)
        for step in walk:
            advance(publication, ledger, step)
    for step in walk:
        with open_ledger(with_restarts) as ledger:
            again = Publication(BUNDLE, ledger, codec, optimizer)
            advance(again, ledger, step)
    assert again.digest == publication.digest
    np.testing.assert_array_equal(again.parameters(), publication.parameters())


def test_the_pace_is_that_of_aggregates_less_in_the_first_rounds_and_the_same_after_a_restart(tmp_path):
    rng = np.random.default_rng(5)
    paces = []
    with open_ledger(tmp_path) as ledger:
        publication = Publication(BUNDLE, ledger, Codec(), sgd())
        assert publication.pace == 0
        direction = rng.normal(0, 0.01, SIZE)
        for _ in range(40):
            advance(publication, ledger, (direction + rng.normal(0, 0.001, SIZE)).astype(np.float32))
            paces.append(publication.pace / 0.01)
    assert paces[0] == pytest.approx(1 / 3, rel=0.2)
    assert paces[14] == pytest.approx(0.04 * 15, rel=0.2)  # a share of all that was learned in 15 rounds
    assert paces[-1] == pytest.approx(1, rel=0.2)
    with open_ledger(tmp_path) as ledger:
        assert Publication(BUNDLE, ledger, Codec(), sgd()).pace / 0.01 == paces[-1]


def test_without_a_codec_there_is_no_pace(ledger):
    publication = Publication(BUNDLE, ledger, Codec(kind="none"), sgd())
    advance(publication, ledger, steps(1)[0])
    assert publication.pace == 0


def test_the_optimizer_moves_the_model(ledger):
    publication = Publication(BUNDLE, ledger, Codec(kind="none"), sgd(0.5, 0.9))
    ones = np.ones(SIZE, np.float32)
    for _ in range(2):
        advance(publication, ledger, ones)
    np.testing.assert_allclose(publication.parameters() - BUNDLE.initial(), 0.5 + 0.5 * 1.9, rtol=1e-5)


def test_a_forgotten_version_is_named(tmp_path):
    with open_ledger(tmp_path) as ledger:
        publication = Publication(BUNDLE, ledger, Codec(), sgd())
        for step in steps(4):
            advance(publication, ledger, step, keep={1})
        ledger.put(BEST, "4")
    with open_ledger(tmp_path) as ledger:
        publication = Publication(BUNDLE, ledger, Codec(), sgd())
        publication.delta(1)
        with pytest.raises(LedgerError, match="version 2 of the model is not in the ledger any more"):
            publication.delta(2)
        with pytest.raises(LedgerError, match="version 9"):
            publication.parameters(9)


@pytest.mark.parametrize(
    ("codec", "optimizer", "words"),
    [(Codec(kind="none"), sgd(), "codec.kind"), (Codec(), sgd(1.0, 0.5), r"was \[server\] or .* changed")],
)
def test_a_ledger_of_other_settings_is_refused(ledger, codec, optimizer, words):
    advance(Publication(BUNDLE, ledger, Codec(), sgd()), ledger, steps(1)[0])
    with pytest.raises(LedgerError, match=words):
        Publication(BUNDLE, ledger, codec, optimizer)


def test_a_version_and_the_close_of_its_task_are_one_step(ledger):
    publication = Publication(BUNDLE, ledger, Codec(), sgd())
    result = Round(round=1, version=1, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0)
    with pytest.raises(LedgerError, match="is not open"):
        publication.advance(Gathered(steps(1)[0]), result, closes=[(1, 1)], keep=())
    assert ledger.latest() is None
    assert ledger.rounds() == []


def test_a_delta_is_built_once_for_each_version_in_use(ledger, monkeypatch):
    built = []

    def build(old, new):
        built.append(old.digest())
        return encode_model_delta(old, new)

    monkeypatch.setattr("broker_server.publication.encode_model_delta", build)
    publication = Publication(BUNDLE, ledger, Codec(), sgd())
    for step in steps(3):
        advance(publication, ledger, step, keep=range(4))
    first = publication.delta(1)
    assert [publication.delta(held) for held in (1, 0, 1, 0)] == [first, publication.delta(0)] * 2
    assert len(built) == 2
    advance(publication, ledger, steps(4)[3], keep=range(4))
    assert publication.delta(1) != first
    assert len(built) == 3


def test_cached_deltas_take_no_more_than_one_model(ledger, monkeypatch):
    monkeypatch.setattr("broker_server.publication._DELTAS", 0)
    publication = Publication(BUNDLE, ledger, Codec(model_step=0.01), sgd())
    for step in steps(6, scale=1.0):
        advance(publication, ledger, step, keep=range(7))
    for held in range(6):
        publication.delta(held)
    sizes = [len(data) for data in publication._deltas.values()]
    assert 1 <= len(sizes) < 6
    assert sum(sizes) <= 4 * SIZE


def paces(ledger, scales) -> list[float]:
    publication, found = Publication(BUNDLE, ledger, Codec(), sgd()), []
    for seed, scale in enumerate(scales):
        advance(publication, ledger, steps(1, seed, scale)[0])
        stored = ledger.latest()
        assert stored is not None
        found.append(stored.pace)
    return found


def test_the_step_follows_lasting_changes_of_the_rounds_and_not_one_odd_round(ledger):
    found = paces(ledger, [0.01] * 12 + [1e-9, 0.01, 0.01, 1e9, 0.01] + [0.001] * 40)
    assert 0.7 < min(found[:17]) / found[0] < max(found[:17]) / found[0] < 1.5
    assert found[-1] < 0.2 * found[0]


def test_a_client_that_missed_versions_takes_one_code_and_a_new_one_little_more(ledger):
    publication = Publication(BUNDLE, ledger, Codec(), sgd())
    rng = np.random.default_rng(1)
    for _ in range(47):
        advance(publication, ledger, rng.normal(0.002, 0.01, SIZE).astype(np.float32), keep=range(50))
    lengths = [len(publication.delta(held)) for held in range(47)]
    assert len(set(lengths[40:])) == 1
    assert max(lengths) < 5 * lengths[-1]


def test_a_ledger_of_an_older_format_is_named(ledger):
    advance(Publication(BUNDLE, ledger, Codec(), sgd()), ledger, steps(1)[0])
    with ledger.group():
        ledger._database.write("UPDATE versions SET state = x'4653020000'")
    with pytest.raises(LedgerError, match=r"format version 2.*; go on with the fedge that wrote it"):
        Publication(BUNDLE, ledger, Codec(), sgd())


def test_tiny_rounds_do_not_make_the_step_too_fine(ledger):
    publication = Publication(BUNDLE, ledger, Codec(), sgd())
    for scale in (0.1, *[1e-15] * 200, 0.1, 1.0):
        advance(publication, ledger, steps(1, scale=scale)[0])
    expected = BUNDLE.initial() + sum(steps(1, scale=scale)[0] for scale in (0.1, 0.1, 1.0))
    np.testing.assert_allclose(publication.parameters(), expected, atol=1e-4)


def test_a_round_that_diverged_does_not_end_the_server(ledger):
    publication = Publication(BUNDLE, ledger, Codec(), sgd())
    clipped = []
    for scale in (0.01, 1e14, 0.01):
        held = publication.version
        before = publication.parameters()
        clipped.append(advance(publication, ledger, steps(1, scale=scale)[0]))
        assert np.isfinite(publication.parameters()).all()
        assert before.shape == publication.parameters().shape
        publication.delta(held)
        publication.delta(0)
    assert clipped[0] == 0
    assert clipped[1] > SIZE // 2

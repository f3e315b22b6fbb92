"""Training equals the same steps in numpy, touches nothing that it was given, and says what it cannot do."""

import dataclasses
import math
import threading

import msgspec
import numpy as np
import onnx
import pytest

from edge_client.bundle import Bundle, with_manifest
from edge_client.course import Course
from edge_client.data import ArraySource
from edge_client.errors import BundleError, CodecError, DataError, TrainingError
from edge_client.manifest import with_personal
from edge_client.trainer import Trainer, _epoch_seed
from edge_client.wire.messages import TrainPlan
from tests.toy import reference_step, toy_bundle, toy_data

SEED = 5


def numpy_training(bundle, source, plan, seed, **hypers):
    """The loop in numpy: the final vector, and mean loss, correct and count of the last epoch."""
    views = bundle.layout.views(bundle.initial())
    anchor, velocity = dict(views), {name: np.zeros_like(view) for name, view in views.items()}
    gain = bundle.weights.get("gain", np.float32(1))
    steps, epoch = 0, 0
    while epoch < plan.epochs if plan.steps == 0 else steps < plan.steps:
        loss = right = count = 0
        for batch in source.batches(plan.batch_size, seed=_epoch_seed(seed, epoch)):
            x, y = batch["x"] * gain, batch["y"]
            views, velocity, mean, correct = reference_step(views, velocity, anchor, x, y, **hypers)
            loss, right, count = loss + mean * len(y), right + correct, count + len(y)
            steps += 1
            if steps == plan.steps:
                break
        epoch += 1
    return bundle.layout.flatten(views), loss / count, right, count, steps


CASES = {
    "plain": ({}, TrainPlan(epochs=2, batch_size=10), {}),
    "hidden layer": ({"hidden": 6}, TrainPlan(epochs=3, batch_size=8, hypers={"lr": 0.5}), {"lr": 0.5}),
    "weight decay": ({}, TrainPlan(hypers={"weight_decay": 0.1}), {"weight_decay": 0.1}),
    "momentum": ({"momentum": True, "hidden": 3}, TrainPlan(epochs=4, batch_size=7), {"momentum": 0.9}),
    "proximal": (
        {"proximal": True},
        TrainPlan(epochs=3, batch_size=9, hypers={"mu": 1.5}),
        {"mu": 1.5},
    ),
    "proximal and momentum": (
        {"proximal": True, "momentum": True},
        TrainPlan(epochs=3, hypers={"momentum": 0.5}),
        {"momentum": 0.5, "mu": 0.01},
    ),
    "frozen": ({"frozen": True, "hidden": 4}, TrainPlan(epochs=2), {}),
    "steps within an epoch": ({}, TrainPlan(epochs=9, steps=3, batch_size=10), {}),
    "steps over several epochs": ({"momentum": True}, TrainPlan(steps=17, batch_size=10), {"momentum": 0.9}),
    "steps that end an epoch": ({}, TrainPlan(steps=10, batch_size=10), {}),
    "a batch larger than the data": ({}, TrainPlan(epochs=2, batch_size=1000), {}),
    "one sample a batch": ({}, TrainPlan(batch_size=1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_numpy(case):
    options, plan, hypers = CASES[case]
    bundle, source = Bundle.from_bytes(toy_bundle(**options)), ArraySource(toy_data(47, SEED))
    result = Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED)
    vector, loss, correct, count, steps = numpy_training(bundle, source, plan, SEED, **hypers)
    np.testing.assert_allclose(result.local, vector, rtol=2e-5, atol=2e-6)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert (result.metrics["correct"], result.metrics["count"], result.steps) == (correct, count, steps)
    assert result.metrics["loss"] == pytest.approx(loss * count, rel=1e-5)
    assert result.finished
    assert result.seconds > 0


@pytest.mark.parametrize(("plan", "samples"), [(TrainPlan(epochs=3), 47), (TrainPlan(steps=2, batch_size=10), 20)])
def test_samples_are_counted_once(plan, samples):
    bundle = Bundle.from_bytes(toy_bundle())
    result = Trainer(bundle).train(bundle.initial(), ArraySource(toy_data(47)), plan, seed=SEED)
    assert result.samples == samples


def test_the_model_is_trained_in_place_and_only_read_by_evaluation():
    bundle = Bundle.from_bytes(toy_bundle(momentum=True, proximal=True, hidden=3))
    model = bundle.initial()
    trainer, source = Trainer(bundle), ArraySource(toy_data(50))
    result = trainer.train(model, source, TrainPlan(epochs=3), seed=SEED)
    assert result.local is model
    assert not np.array_equal(model, bundle.initial())
    after = model.copy()
    model.flags.writeable = False
    trainer.evaluate(model, source)
    np.testing.assert_array_equal(model, after)
    with pytest.raises(CodecError, match="read-only"):
        trainer.train(model, source, TrainPlan(), seed=SEED)


def test_a_result_survives_the_next_run():
    bundle = Bundle.from_bytes(toy_bundle())
    trainer, source = Trainer(bundle), ArraySource(toy_data(50))
    first = trainer.train(bundle.initial(), source, TrainPlan(), seed=SEED)
    kept = first.local.copy()
    trainer.train(first.local.copy(), source, TrainPlan(epochs=2), seed=SEED)
    np.testing.assert_array_equal(first.local, kept)


def test_each_run_starts_afresh():
    """Optimizer state, buffers, hyperparameters and the buffer that was written last do not leak into the next run."""
    bundle = Bundle.from_bytes(toy_bundle(momentum=True, proximal=True, buffer=True))
    trainer, source, plan = Trainer(bundle), ArraySource(toy_data(33)), TrainPlan(epochs=1, batch_size=11)
    first = trainer.train(bundle.initial(), source, plan, seed=SEED)
    other = TrainPlan(epochs=3, hypers={"lr": 1.0, "mu": 9.0})
    trainer.train(first.local.copy(), source, other, seed=1, buffers=first.buffers)
    again = trainer.train(bundle.initial(), source, plan, seed=SEED)
    np.testing.assert_array_equal(first.local, again.local)
    np.testing.assert_array_equal(first.buffers, again.buffers)


def test_equal_seeds_equal_bits_and_other_seeds_other_orders():
    bundle, source = Bundle.from_bytes(toy_bundle()), ArraySource(toy_data(60))

    def trained(seed):
        return Trainer(bundle).train(bundle.initial(), source, TrainPlan(), seed=seed).local

    np.testing.assert_array_equal(trained(1), trained(1))
    assert not np.array_equal(trained(1), trained(2))


def test_epochs_are_shuffled_differently():
    assert len({_epoch_seed(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_buffers_follow_the_data():
    bundle, data = Bundle.from_bytes(toy_bundle(buffer=True)), toy_data(30)
    trainer, source = Trainer(bundle), ArraySource(data)
    start = np.array([1, 2, 3, 4, 100], np.float32)
    result = trainer.train(bundle.initial(), source, TrainPlan(epochs=2, batch_size=12), seed=SEED, buffers=start)
    mean = start[:4].astype(np.float64)
    for epoch in range(2):
        for batch in source.batches(12, seed=_epoch_seed(SEED, epoch)):
            mean += 0.1 * (batch["x"].mean(0) - mean)
    np.testing.assert_allclose(result.buffers[:4], mean, rtol=1e-5)
    assert result.buffers[4] == 160
    np.testing.assert_array_equal(start, [1, 2, 3, 4, 100])
    assert trainer.evaluate(result.local, source, buffers=result.buffers)["count"] == 30


def test_it_learns():
    bundle = Bundle.from_bytes(toy_bundle(hidden=8))
    trainer, test = Trainer(bundle), ArraySource(toy_data(400, 2))
    result = trainer.train(bundle.initial(), ArraySource(toy_data(400, 1)), TrainPlan(epochs=20), seed=SEED)
    after = trainer.evaluate(result.local, test)
    assert after["correct"] / after["count"] > 0.9


@pytest.mark.parametrize("size", [1, 7, 40, 41, 256])
def test_evaluation_is_a_sum_whatever_the_batch(size):
    bundle = Bundle.from_bytes(toy_bundle(frozen=True))
    source, vector = ArraySource(toy_data(41)), bundle.initial()
    sums = Trainer(bundle).evaluate(vector, source, batch_size=size)
    x, y = source.arrays["x"] * bundle.weights["gain"], source.arrays["y"]
    views = bundle.layout.views(vector)
    *_, loss, correct = reference_step(views, {n: 0 * v for n, v in views.items()}, views, x, y)
    assert sums == {"loss": pytest.approx(loss * 41, rel=1e-5), "count": 41, "correct": correct}


def test_evaluation_follows_the_model():
    bundle, source = Bundle.from_bytes(toy_bundle()), ArraySource(toy_data(41))
    trainer = Trainer(bundle)
    first = trainer.evaluate(bundle.initial(), source)
    zeros = trainer.evaluate(np.zeros(bundle.layout.size, np.float32), source)
    assert zeros["loss"] == pytest.approx(41 * math.log(3), rel=1e-5)
    assert trainer.evaluate(bundle.initial(), source) == first


def test_integer_pixels_are_scaled():
    bundle = Bundle.from_bytes(toy_bundle(scale=1 / 255))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4), np.uint8)
    labels = (np.arange(40) % 3).astype(np.uint8)
    floats = {"x": (pixels / np.float32(255)).astype(np.float32), "y": labels.astype(np.int64)}
    whole = [
        Trainer(bundle).train(bundle.initial(), ArraySource(arrays), TrainPlan(), seed=SEED).local
        for arrays in (floats, {"x": pixels, "y": labels}, {"x": pixels.astype(np.int32), "y": labels.astype(np.int32)})
    ]
    np.testing.assert_allclose(whole[1], whole[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(whole[1], whole[2])


def test_stop_is_asked_before_each_step():
    bundle, source = Bundle.from_bytes(toy_bundle()), ArraySource(toy_data(64))
    answers = iter([False, False, False, True])
    plan = TrainPlan(epochs=9, batch_size=16)
    result = Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED, stop=lambda: next(answers))
    assert (result.steps, result.samples, result.finished) == (3, 48, False)
    vector, *_ = numpy_training(bundle, source, TrainPlan(steps=3, batch_size=16), SEED)
    np.testing.assert_allclose(result.local, vector, rtol=1e-5, atol=1e-6)


def test_stopped_at_once_is_the_received_model():
    bundle, source = Bundle.from_bytes(toy_bundle()), ArraySource(toy_data(64))
    result = Trainer(bundle).train(bundle.initial(), source, TrainPlan(), seed=SEED, stop=lambda: True)
    np.testing.assert_array_equal(result.local, bundle.initial())
    assert (result.steps, result.samples, result.finished) == (0, 0, False)
    assert math.isnan(result.loss)


def test_the_distance_is_the_sum_of_the_learning_rates_of_the_steps():
    bundle, source = Bundle.from_bytes(toy_bundle()), ArraySource(toy_data(64))
    plan = TrainPlan(epochs=2, batch_size=16, hypers={"lr": 0.25})
    result = Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED)
    assert (result.steps, result.epochs, result.distance) == (8, 2, 2.0)
    falling = msgspec.structs.replace(plan, schedule="linear")
    result = Trainer(bundle).train(bundle.initial(), source, falling, seed=SEED)
    assert result.distance == pytest.approx(0.25 * sum(1 - step / 8 for step in range(8)), rel=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_is_another_learning_rate_in_each_step(schedule):
    bundle, source = Bundle.from_bytes(toy_bundle(hidden=3)), ArraySource(toy_data(47))
    plan = TrainPlan(epochs=2, batch_size=10, hypers={"lr": 0.5, "weight_decay": 0.1}, schedule=schedule)
    result = Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED)
    views, done = bundle.layout.views(bundle.initial()), 0
    still = {name: np.zeros_like(view) for name, view in views.items()}
    for epoch in range(2):
        for batch in source.batches(10, seed=_epoch_seed(SEED, epoch)):
            rate = 0.5 * Course(10, schedule=schedule).factor(done)
            views, *_ = reference_step(views, still, views, batch["x"], batch["y"], lr=rate, weight_decay=0.1)
            done += 1
    np.testing.assert_allclose(result.local, bundle.layout.flatten(views), rtol=2e-5, atol=2e-6)


class Ticking:
    """A clock that goes on by a second with each step, before which a run asks whether to stop."""

    now = 0.0

    def __call__(self):
        return self.now

    def step(self):
        self.now += 1.0
        return False


@pytest.mark.parametrize(("seconds", "steps"), [(0.5, 1), (1.0, 1), (4.5, 5), (7.0, 7), (1000.0, 12)])
def test_training_ends_with_the_first_step_after_its_seconds(seconds, steps):
    bundle, source, clock = Bundle.from_bytes(toy_bundle()), ArraySource(toy_data(64)), Ticking()
    plan = TrainPlan(epochs=3, batch_size=16, seconds=seconds)
    trainer = Trainer(bundle, clock=clock)
    result = trainer.train(bundle.initial(), source, plan, seed=SEED, stop=clock.step)
    assert (result.steps, result.finished, result.seconds) == (steps, True, steps)
    vector, *_ = numpy_training(bundle, source, TrainPlan(steps=steps, batch_size=16), SEED)
    np.testing.assert_allclose(result.local, vector, rtol=1e-5, atol=1e-6)


def test_divergence_is_reported_not_raised():
    bundle = Bundle.from_bytes(toy_bundle(hidden=4))
    plan = TrainPlan(epochs=30, hypers={"lr": 1e30})
    result = Trainer(bundle).train(bundle.initial(), ArraySource(toy_data(64)), plan, seed=SEED)
    assert not np.isfinite(result.local).all()
    assert not math.isfinite(result.loss)


def test_trainers_run_in_parallel():
    bundle = Bundle.from_bytes(toy_bundle(hidden=16, momentum=True))
    sources = [ArraySource(toy_data(300, seed)) for seed in range(2)]
    plan = TrainPlan(epochs=5)
    alone = [Trainer(bundle).train(bundle.initial(), s, plan, seed=i).local for i, s in enumerate(sources)]
    together = [None, None]
    start = threading.Barrier(2)

    def work(i):
        trainer = Trainer(bundle)
        start.wait()
        together[i] = trainer.train(bundle.initial(), sources[i], plan, seed=i).local

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


class Odd:
    """A source that gives the batches it was made of."""

    def __init__(self, *batches, samples=4):
        self._batches, self.samples = batches, samples

    def batches(self, size, *, seed):
        return iter(self._batches)


X, Y = np.zeros((4, 4), np.float32), np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (Odd(samples=0), "empty"),
        (Odd(), "gave no batch"),
        (Odd({"y": Y}), "0 rows of 'x'"),
        (Odd({"x": X[:0], "y": Y[:0]}), "0 rows of 'x'"),
        (Odd({"x": X.tolist(), "y": Y}), "0 rows of 'x'"),
        (Odd({"x": np.zeros((99, 4), np.float32), "y": np.zeros(99, np.int64)}), "99 rows of 'x'; expected 1 to 32"),
        (Odd({"x": X}), r"'y' is missing; expected int64 .*\[4\]"),
        (Odd({"x": X, "y": Y[:3]}), r"'y' is int64 \[3\]; expected int64 .*\[4\]"),
        (Odd({"x": X, "y": [0, 0, 0, 0]}), r"'y' is a list .*expected int64 .*\[4\]"),
        (Odd({"x": X[:, :1], "y": Y}), r"'x' is float32 \[4, 1\]; expected float32 .*\[4, 4\]"),
        (Odd({"x": X.astype("U"), "y": Y}), r"'x' is <U32 \[4, 4\]; expected float32"),
        (Odd({"x": X, "y": Y.astype(float)}), r"'y' is float64 \[4\]; expected int64"),
    ],
)
def test_a_source_that_does_not_fit(source, says):
    bundle = Bundle.from_bytes(toy_bundle())
    with pytest.raises(DataError, match=says):
        Trainer(bundle).train(bundle.initial(), source, TrainPlan(), seed=SEED)


@pytest.mark.parametrize(
    ("hypers", "says"),
    [
        ({"rate": 0.1}, "'rate' is unknown to bundle 'toy'; it has lr, weight_decay"),
        ({"mu": 0.1}, "'mu' is unknown"),
        ({"lr": math.nan}, "'lr' is nan; expected a finite number"),
        ({"lr": math.inf}, "'lr' is inf"),
    ],
)
def test_hypers_are_checked(hypers, says):
    bundle = Bundle.from_bytes(toy_bundle())
    with pytest.raises(TrainingError, match=says):
        Trainer(bundle).train(bundle.initial(), ArraySource(toy_data(9)), TrainPlan(hypers=hypers), seed=SEED)


@pytest.mark.parametrize(
    "plan", [{"epochs": 0}, {"steps": -1}, {"batch_size": 0}, {"batch_size": 1 << 20}, {"rounds": 1}]
)
def test_plans_are_bounded(plan):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plan, TrainPlan)


@pytest.mark.parametrize("vector", [np.zeros(3, np.float32), np.zeros(15), np.zeros((15, 1), np.float32)])
def test_a_model_of_another_size(vector):
    bundle, source = Bundle.from_bytes(toy_bundle()), ArraySource(toy_data(9))
    with pytest.raises(CodecError, match=r"expected float32 \[15\]"):
        Trainer(bundle).train(vector, source, TrainPlan(), seed=SEED)
    with pytest.raises(CodecError, match=r"expected float32 \[15\]"):
        Trainer(bundle).evaluate(vector, source)
    with pytest.raises(CodecError, match=r"expected float32 \[0\]"):
        Trainer(bundle).train(bundle.initial(), source, TrainPlan(), seed=SEED, buffers=vector[:1].ravel())


def test_control_variates_join_every_gradient():
    bundle = Bundle.from_bytes(toy_bundle(control=True))
    trainer, source, plan = Trainer(bundle), ArraySource(toy_data(30)), TrainPlan(steps=3, batch_size=10)
    control = np.linspace(-1, 1, bundle.layout.size, dtype=np.float32)
    plain = trainer.train(bundle.initial(), source, plan, seed=SEED).local
    moved = trainer.train(bundle.initial(), source, plan, seed=SEED, control=control).local
    # The gradient changes along the way as well, but by little.
    np.testing.assert_allclose(moved - plain, -0.1 * 3 * control, atol=0.08)
    np.testing.assert_array_equal(trainer.train(bundle.initial(), source, plan, seed=SEED).local, plain)
    with pytest.raises(CodecError, match=r"expected float32 \[15\]"):
        trainer.train(bundle.initial(), source, plan, seed=SEED, control=control[:3])
    other = Bundle.from_bytes(toy_bundle())
    with pytest.raises(TrainingError, match="takes no control variates"):
        Trainer(other).train(other.initial(), source, plan, seed=SEED, control=control)


def test_constants_that_the_manifest_does_not_name_are_missed():
    bundle = rebuilt({"frozen": True}, constants={"train.onnx": (), "eval.onnx": (), "infer.onnx": ()})
    with pytest.raises(BundleError, match="export the bundle again"):
        Trainer(bundle).train(bundle.initial(), ArraySource(toy_data(9)), TrainPlan(), seed=SEED)
    with pytest.raises(BundleError, match="export the bundle again"):
        Trainer(bundle).evaluate(bundle.initial(), ArraySource(toy_data(9)))


def test_a_graph_may_count_its_predictions():
    """A row may hold several, as a sequence does; then losses and metrics go by them, not by rows."""
    bundle = Bundle.from_bytes(toy_bundle())
    model = onnx.load_from_string(bundle.train)
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["ones"], ["sum.count"], keepdims=0))
    ones = onnx.helper.make_tensor("ones", onnx.TensorProto.FLOAT, [64], [1.0] * 64)
    model.graph.initializer.append(ones)
    model.graph.output.append(onnx.helper.make_tensor_value_info("sum.count", onnx.TensorProto.FLOAT, []))
    counting = dataclasses.replace(bundle, train=model.SerializeToString())
    source = ArraySource(toy_data(32))
    plain, counted = (Trainer(b).train(b.initial(), source, TrainPlan(), seed=SEED) for b in (bundle, counting))
    assert (plain.metrics["count"], counted.metrics["count"]) == (32, 64)
    assert counted.loss == pytest.approx(plain.loss)
    assert counted.samples == plain.samples == 32


def rebuilt(options, **changes):
    made = Bundle.from_bytes(toy_bundle(**options))
    manifest = msgspec.structs.replace(made.manifest, **changes)
    return Bundle(manifest, made.digest, made.train, made.eval, made.infer, made.weights)


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        ({}, {"proximal": True}, r"train\.onnx lacks input 'anchor\.bias'"),
        ({"proximal": True}, {"proximal": False}, r"train\.onnx has the unknown input 'anchor\.bias'"),
        ({}, {"control": True}, r"train\.onnx lacks input 'control\.bias'"),
        ({"control": True}, {"control": False}, r"train\.onnx has the unknown input 'control\.bias'"),
        ({}, {"metrics": ("recall",)}, r"train\.onnx lacks output 'sum\.recall'"),
        ({}, {"metrics": ()}, r"train\.onnx has the unknown output 'sum\.correct'"),
        ({}, {"hypers": ()}, r"train\.onnx has the unknown input 'hyper\.lr'"),
    ],
)
def test_graphs_that_do_not_fit_the_manifest(options, changes, says):
    bundle = rebuilt(options, **changes)
    with pytest.raises(BundleError, match=says):
        Trainer(bundle).train(bundle.initial(), ArraySource(toy_data(9)), TrainPlan(), seed=SEED)


def test_evaluation_graph_that_does_not_fit_the_manifest():
    bundle = rebuilt({}, metrics=("recall",))
    with pytest.raises(BundleError, match=r"eval\.onnx lacks output 'sum\.recall'"):
        Trainer(bundle).evaluate(bundle.initial(), ArraySource(toy_data(9)))


def test_an_inference_graph_that_does_not_fit_the_manifest():
    (logits,) = rebuilt({}).manifest.outputs
    bundle = rebuilt({}, outputs=(msgspec.structs.replace(logits, shape=(2,)),))
    with pytest.raises(TrainingError, match=r"infer\.onnx gives other outputs than its manifest says"):
        next(iter(Trainer(bundle).predict(bundle.initial(), ArraySource(toy_data(9)))))


def test_a_newer_runtime_is_asked_for():
    with pytest.raises(BundleError, match=r"needs onnxruntime 99\.1, .* is installed; run `pip install"):
        Trainer(rebuilt({}, least_runtime="99.1"))


PARTS = {
    "hidden": ({"hidden.weight", "hidden.bias"}, {"momentum": True, "hidden": 4}),
    "the last": ({"weight", "bias"}, {"momentum": True, "hidden": 4, "proximal": True}),
    "all": ({"hidden.weight", "hidden.bias", "weight", "bias"}, {"hidden": 4, "control": True}),
}


@pytest.mark.parametrize("name", PARTS)
def test_parameters_that_are_fixed_stay_and_the_others_train_as_beside_them(name):
    fixed, options = PARTS[name]
    bundle = Bundle.from_bytes(toy_bundle(**options))
    source, plan = ArraySource(toy_data(10)), TrainPlan(epochs=1, batch_size=10)
    whole = bundle.layout.views(Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED).local)
    found = bundle.layout.views(Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED, fixed=fixed).local)
    start = bundle.layout.views(bundle.initial())
    for tensor, value in found.items():
        np.testing.assert_array_equal(value, start[tensor] if tensor in fixed else whole[tensor], err_msg=tensor)
        assert not np.array_equal(whole[tensor], start[tensor])


def test_a_fixed_parameter_stays_over_many_steps_with_momentum():
    bundle = Bundle.from_bytes(toy_bundle(momentum=True, hidden=4))
    source, plan = ArraySource(toy_data(50)), TrainPlan(epochs=3, batch_size=10)
    fixed = {"hidden.weight", "hidden.bias"}
    found = bundle.layout.views(Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED, fixed=fixed).local)
    views = bundle.layout.views(bundle.initial())
    start, velocity = dict(views), {name: np.zeros_like(view) for name, view in views.items()}
    for epoch in range(3):
        for batch in source.batches(10, seed=_epoch_seed(SEED, epoch)):
            views, velocity, *_ = reference_step(views, velocity, start, batch["x"], batch["y"], momentum=0.9)
            views = {name: start[name] if name in fixed else value for name, value in views.items()}
    for name, value in views.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_control_variates_push_at_what_is_shared_and_not_at_personal_parameters():
    data = with_manifest(
        toy_bundle(hidden=4, control=True), lambda manifest: with_personal(manifest, ["hidden.weight", "bias"])
    )
    bundle = Bundle.from_bytes(data)
    source, plan = ArraySource(toy_data(10)), TrainPlan(epochs=1, batch_size=10, hypers={"lr": 0.5})
    control = np.arange(bundle.layout.size, dtype=np.float32)
    start = bundle.first(bundle.trained)
    found = Trainer(bundle).train(start.copy(), source, plan, seed=SEED, control=control).local
    plain = Trainer(bundle).train(start.copy(), source, plan, seed=SEED).local
    pushed = np.zeros(bundle.trained.size, np.float32)
    bundle.trained.insert(pushed, bundle.layout, -0.5 * control)
    np.testing.assert_allclose(found - plain, pushed, atol=1e-5)


def test_the_proximal_term_pulls_to_the_anchor_that_is_given():
    bundle = Bundle.from_bytes(toy_bundle(proximal=True))
    source, plan = ArraySource(toy_data(10)), TrainPlan(epochs=1, batch_size=10, hypers={"lr": 0.1, "mu": 1.0})
    anchor = bundle.initial() + np.float32(1)
    found = Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED, anchor=anchor).local
    plain = Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED).local
    np.testing.assert_allclose(found - plain, np.full_like(plain, 0.1), rtol=1e-5)
    with pytest.raises(CodecError):
        Trainer(bundle).train(bundle.initial(), source, plan, seed=SEED, anchor=anchor[1:])


def test_a_graph_that_fails_while_running_is_a_training_error():
    wide = msgspec.structs.replace(rebuilt({}).manifest.inputs[0], shape=(5,))
    bundle = rebuilt({}, inputs=(wide,))
    with pytest.raises(TrainingError, match="failed while running the graph"):
        Trainer(bundle).train(bundle.initial(), ArraySource(toy_data(9, features=5)), TrainPlan(), seed=SEED)

"""How a learning rate falls over a task, by hand and against PyTorch's schedulers, and when its time is up."""

import pytest
import torch

from edge_client.course import Course
from edge_client.wire.messages import TrainPlan


class Clock:
    """Says the time that it was set to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("plan", "samples", "steps"),
    [
        (TrainPlan(epochs=3, batch_size=10), 47, 15),
        (TrainPlan(epochs=3, batch_size=10), 50, 15),
        (TrainPlan(epochs=9, steps=7, batch_size=10), 50, 7),
        (TrainPlan(epochs=2, batch_size=10), 1, 2),
        (TrainPlan(epochs=2, batch_size=10), 0, 1),
    ],
)
def test_the_steps_of_a_plan_are_known_before(plan, samples, steps):
    assert Course.of(plan, samples).steps == steps


def test_factors_by_hand():
    assert [Course(4, schedule="constant").factor(done) for done in range(4)] == [1, 1, 1, 1]
    assert [Course(4, schedule="linear").factor(done) for done in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    half = 2**0.5 / 4
    assert [Course(4, schedule="cosine").factor(done) for done in range(4)] == pytest.approx(
        [1, 0.5 + half, 0.5, 0.5 - half]
    )


@pytest.mark.parametrize("steps", [1, 2, 13])
def test_factors_as_in_pytorch(steps):
    made = {
        "linear": lambda one: torch.optim.lr_scheduler.LinearLR(one, 1.0, 1e-12, total_iters=steps),
        "cosine": lambda one: torch.optim.lr_scheduler.CosineAnnealingLR(one, T_max=steps),
    }
    for kind, make in made.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, course = make(optimizer), Course(steps, schedule=kind)
        for done in range(steps):
            assert course.factor(done) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
            optimizer.step()
            scheduler.step()


def test_the_first_step_is_whole_however_long_its_batch_took():
    clock = Clock()
    course = Course(10, 8.0, "cosine", clock)
    clock.now += 6.0
    assert course.factor(0) == 1
    assert course.factor(1) < 0.5


def test_with_a_bound_in_time_it_falls_by_whichever_is_further():
    clock = Clock()
    course = Course(10, 8.0, "linear", clock)
    assert course.factor(0) == 1
    clock.now += 2.0
    assert (course.factor(1), course.factor(5)) == (0.75, 0.5)
    clock.now += 100.0
    assert course.factor(2) == 0


def test_more_steps_than_planned_stay_at_the_end():
    for schedule in ("linear", "cosine"):
        assert Course(3, schedule=schedule).factor(4) == 0


def test_time_is_up_once_so_many_seconds_have_passed():
    clock = Clock()
    bound, free = Course(10, 8.0, clock=clock), Course(10, clock=clock)
    clock.now += 7.5
    assert (bound.elapsed(), bound.over(), free.over()) == (7.5, False, False)
    clock.now += 0.5
    assert (bound.over(), free.over()) == (True, False)


def test_the_last_step_is_foreseen_from_how_long_the_others_took():
    clock = Clock()
    course = Course(10, 8.0, clock=clock)
    clock.now += 5.9
    assert not course.closing(3)  # four would have taken 7.9 seconds
    assert course.closing(2)  # three would have taken 8.9
    assert not Course(10, clock=clock).closing(3)

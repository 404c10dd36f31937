"""The estimate of the time left: none before a speed is known, and right once it is."""

import pytest

from grasp_lightning.progress import Stage, Work
from grasp_lightning.progress.estimate import Estimate

STAGES = [
    Stage(phase="load", label="load"),
    Stage(phase="evaluate", label="before"),
    Stage(phase="measure", label="measure", passes=2),
    Stage(phase="evaluate", label="after"),
    Stage(phase="save", label="save", like="load"),
]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def estimate(clock: Clock) -> Estimate:
    """An estimate after a load of 10 seconds, with a measurement 3 times as long as the others."""
    estimate = Estimate(STAGES, clock)
    clock.now = 10.0
    estimate.follow("evaluate")
    estimate.expect_work({"evaluate": Work(100), "measure": Work(300)})
    return estimate


def test_there_is_no_estimate_before_a_speed_is_known(clock: Clock, estimate: Estimate) -> None:
    assert Estimate(STAGES, clock).seconds_left is None
    estimate.advance(0.0)
    clock.now += 5
    assert estimate.seconds_left is None
    assert estimate.share_done is None


def test_the_speed_of_a_stage_tells_the_time_of_later_ones(
    clock: Clock, estimate: Estimate
) -> None:
    estimate.advance(0.0)
    clock.now += 5
    estimate.advance(0.25)
    # 15 seconds of this stage, 60 of the measurement, 20 of the perplexity after it, 10 to save.
    assert estimate.seconds_left == pytest.approx(15 + 60 + 20 + 10)
    clock.now += 3
    assert estimate.seconds_left == pytest.approx(12 + 60 + 20 + 10)
    assert estimate.share_done == pytest.approx(18 / (18 + 102))


def test_several_passes_are_one_stage(clock: Clock, estimate: Estimate) -> None:
    estimate.follow("measure")
    estimate.advance(0.0)
    clock.now += 30
    estimate.advance(1.0)
    estimate.close_pass()
    assert estimate.seconds_left == pytest.approx(30 + 20 + 10)
    clock.now += 15
    estimate.advance(0.5)
    assert estimate.seconds_left == pytest.approx(15 + 20 + 10)


def test_what_an_earlier_start_has_done_does_not_make_this_one_fast(
    clock: Clock, estimate: Estimate
) -> None:
    estimate.follow("measure")
    estimate.close_pass()
    estimate.advance(0.5)  # three quarters of the stage
    clock.now += 20
    estimate.advance(0.75)
    # An eighth took 20 seconds: the stage takes 160, and a unit of work 160 / 300.
    assert estimate.seconds_left == pytest.approx(20 + 160 / 3 + 10)
    # The perplexity before, which was not measured again, counts as done.
    assert estimate.share_done == pytest.approx(1 - (30 + 160 / 3) / (10 + 160 * 5 / 3 + 10))


def test_a_stage_that_takes_longer_than_expected_has_no_estimate(
    clock: Clock, estimate: Estimate
) -> None:
    estimate.follow("save")
    clock.now += 9
    assert estimate.seconds_left == pytest.approx(1)
    clock.now += 2
    assert estimate.seconds_left is None


def test_stages_are_followed_forward_only(estimate: Estimate) -> None:
    assert estimate.label == "[2/5] before"
    estimate.follow("save", inner=("measure",))  # it wraps a stage that is still ahead
    assert estimate.label == "[2/5] before"
    estimate.follow("measure")
    estimate.follow("load")
    assert estimate.label == "[3/5] measure"
    estimate.follow("evaluate")
    assert estimate.label == "[4/5] after"
    estimate.follow("save", inner=("measure",))
    assert estimate.label == "[5/5] save"

import math

import pytest

from distrain.errors import UserError
from distrain.optim.schedule import (
    ConstantSchedule,
    CosineSchedule,
    GeometricSchedule,
    PlateauSchedule,
    PlateauState,
    PolynomialSchedule,
    Schedule,
    StepSchedule,
)


def rates(schedule, steps=100, steps_per_epoch=10):
    return [schedule.get_lr(s, steps_per_epoch, steps) for s in range(steps)]


def test_constant():
    assert set(rates(ConstantSchedule(lr=0.3))) == {0.3}


def test_step_drops_at_the_start_of_its_epochs():
    found = rates(StepSchedule(lr=1.0, drop_epochs=(2, 5), factor=0.1), 70)
    assert found[:20] == [1.0] * 20
    assert found[20:50] == [0.1] * 30
    assert found[50:] == pytest.approx([0.01] * 20)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_polynomial(power):
    found = rates(PolynomialSchedule(lr=2.0, power=power))
    assert found == pytest.approx([2.0 * (1 - s / 100) ** power for s in range(100)])
    assert found[-1] > 0


def test_cosine():
    found = rates(CosineSchedule(lr=2.0))
    assert found == pytest.approx([1 + math.cos(math.pi * s / 100) for s in range(100)])


def test_geometric_is_the_diarys_best():
    """Four equal levels, the last one 1/250 of the first."""
    found = rates(GeometricSchedule(lr=1.0))
    levels = [found[s] for s in (0, 25, 50, 75)]
    assert found == [level for level in levels for _ in range(25)]
    assert levels[-1] == pytest.approx(1 / 250)
    assert levels[1] / levels[0] == pytest.approx(levels[3] / levels[2])


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSchedule(lr=1.0, warmup_epochs=2.5),
        StepSchedule(lr=1.0, drop_epochs=(5,), warmup_epochs=2.5),
        PolynomialSchedule(lr=1.0, warmup_epochs=2.5),
        CosineSchedule(lr=1.0, warmup_epochs=2.5),
        GeometricSchedule(lr=1.0, warmup_epochs=2.5),
    ],
)
def test_a_warm_up_in_front_of_any(schedule):
    found = rates(schedule)
    assert found[:25] == pytest.approx([(s + 1) / 25 for s in range(25)])
    assert found[25] == 1.0
    assert found[25:] == sorted(found[25:], reverse=True)
    if schedule.name in ("polynomial", "cosine", "geometric"):
        plain = schedule.model_copy(update={"warmup_epochs": 0.0})
        assert found[25:] == pytest.approx(rates(plain, 75))


def drops(counts, **settings):
    """The epochs after which the rate drops, of counts of right samples."""
    schedule, stall = PlateauSchedule(lr=1.0, **settings), PlateauState()
    for epoch, right in enumerate(counts, 1):
        stall = schedule.update_plateau(stall, epoch, right)
    return stall.drops


def test_plateau_drops_when_counts_stall():
    assert drops([1, 2, 3, 3, 2, 3], patience=3) == (6,), "equal counts are no progress"
    assert drops([1, 2, 2, 3, 3, 3], patience=3) == (), "progress starts the wait anew"
    assert drops([5, 1, 1, 1, 1], patience=2, drops=3) == (3, 5), "and so does a drop"
    assert drops([5, 1, 1, 1, 1], patience=1, drops=3) == (2, 3, 4), (
        "no more than there may be"
    )
    assert drops([5, 1, 6, 1, 1], patience=2) == (5,)


def test_plateau_is_a_function_of_its_drops():
    schedule = PlateauSchedule(lr=2.0, factor=0.5, warmup_epochs=1.0)
    found = [schedule.get_lr(s, 10, 100, (30, 70)) for s in (0, 9, 29, 30, 69, 70, 99)]
    assert found == pytest.approx([0.2, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5])


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(factor):
    class Own(ConstantSchedule, name="own"):
        """Of a user's."""

        def compute_lr_factor(self, position):
            return factor

    with pytest.raises(
        UserError,
        match="schedule own has a rate of .* at step 3: it must be finite and above 0",
    ):
        Own(lr=0.1).get_lr(3, 10, 100)
    del Schedule.registry["own"]

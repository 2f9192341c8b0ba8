import pytest

from distrain.config import Constant, Step
from distrain.optim.schedule import learning_rate


def test_constant():
    assert {learning_rate(Constant(name="constant", lr=0.3), s, 10) for s in range(100)} == {0.3}


def test_step_drops_at_the_start_of_its_epochs():
    schedule = Step(name="step", lr=1.0, drop_epochs=(2, 5), factor=0.1)
    rates = [learning_rate(schedule, s, 10) for s in range(70)]
    assert rates[:20] == [1.0] * 20
    assert rates[20:50] == [0.1] * 30
    assert rates[50:] == pytest.approx([0.01] * 20)

import torch

from distrain.monitor.meters import Meters
from distrain.optim.accumulate import Totals


def totals(valid=8, violations=0, loss=2.0, top1=4, top5=6):
    return Totals(
        *(torch.tensor(int(x)) for x in (valid, violations, loss * 2**40, top1, top5))
    )


def test_reading_is_the_mean_since_the_last():
    meters = Meters(torch.device("cpu"), loss_shift=40)
    assert [float(meters.add_step(s, totals())) for s in range(3)] == [1, 1, 1]
    reading = meters.read_and_reset()
    assert (
        reading.num_steps,
        reading.num_valid,
        reading.loss,
        reading.top1,
        reading.top5,
    ) == (
        3,
        24,
        0.25,
        0.5,
        0.75,
    )
    assert reading.failed_step is None
    meters.add_step(3, totals(loss=8))
    assert (meters.read_and_reset().loss, meters.read_and_reset().num_steps) == (1.0, 0)


def test_many_large_losses_do_not_wrap():
    meters = Meters(torch.device("cpu"), loss_shift=40)
    for s in range(100):
        meters.add_step(s, totals(loss=2**22))
    assert meters.read_and_reset().loss == 2**19


def test_after_a_failed_step_nothing_moves_again():
    meters = Meters(torch.device("cpu"), loss_shift=40)
    moves = [float(meters.add_step(s, totals(violations=s == 2))) for s in range(5)]
    assert moves == [1, 1, 0, 0, 0]
    reading = meters.read_and_reset()
    assert (reading.failed_step, reading.no_valid_samples) == (2, False)
    assert float(meters.add_step(5, totals())) == 0


def test_a_step_without_valid_samples_fails():
    meters = Meters(torch.device("cpu"), loss_shift=40)
    assert float(meters.add_step(7, totals(valid=0))) == 0
    reading = meters.read_and_reset()
    assert (reading.failed_step, reading.no_valid_samples) == (7, True)

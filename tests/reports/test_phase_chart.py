"""Where the time went: the sums of what the records tell."""

import pytest
from records import train_record
from run_dirs import write_run

from distrain.reports.history import read_history
from distrain.reports.phase_chart import render_phase_chart, sum_phase_times


def test_times_are_summed_in_the_order_of_a_step(tmp_path):
    records = [
        train_record(step=1, phase_seconds={"optimizer": 1.0, "data_wait": 0.5}),
        train_record(step=2, phase_seconds={"optimizer": 2.0}),
        # Rolled back by the second attempt.
        train_record(step=3, phase_seconds={"optimizer": 100.0}),
    ]
    again = [train_record(step=3, phase_seconds={"reduction": 4.5})]
    history = read_history(
        str(write_run(tmp_path / "run", [records, again], starts=[0, 2]))
    )
    times = sum_phase_times(history)
    assert [(time.phase, time.seconds) for time in times] == [
        ("data_wait", 0.5),
        ("reduction", 4.5),
        ("optimizer", 3.0),
    ]
    assert [time.share for time in times] == [0.0625, 0.5625, 0.375]
    figure = render_phase_chart(history)
    assert "waiting for data: 6.2% (0.5 s); reduction: 56.2% (4.5 s)" in figure


@pytest.mark.parametrize("seconds", [{}, {"forward": 0.0}], ids=["early", "no time"])
def test_a_run_without_times_has_no_chart(tmp_path, seconds):
    records = [train_record(step=1, phase_seconds=seconds)]
    history = read_history(str(write_run(tmp_path / "run", [records], starts=[0])))
    assert render_phase_chart(history) == ""

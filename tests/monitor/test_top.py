"""The live view, from pages and from files."""

import http.server
import json
import math
import socket
import threading
from contextlib import closing

import pytest
import torch

from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.monitor.top import (
    RunWatcher,
    draw_sparkline,
    find_problems,
    render_lines,
    top,
)
from distrain.trainer import train

PAGE = """\
# TYPE distrain_step gauge
distrain_step{run="r"} 40.0
# TYPE distrain_steps_planned gauge
distrain_steps_planned{run="r"} 400.0
# TYPE distrain_loss gauge
distrain_loss{run="r",split="train"} 1.5
# TYPE distrain_images_per_second gauge
distrain_images_per_second{run="r"} 1234.0
# TYPE distrain_restarts gauge
distrain_restarts{run="r"} 2.0
# TYPE distrain_workers gauge
distrain_workers{run="r"} 2.0
# TYPE distrain_workers_wanted gauge
distrain_workers_wanted{run="r"} 3.0
# TYPE distrain_last_progress_timestamp_seconds gauge
distrain_last_progress_timestamp_seconds{run="r"} 1000.0
# TYPE distrain_phase_seconds histogram
distrain_phase_seconds_sum{phase="forward",run="r"} 30.0
distrain_phase_seconds_sum{phase="data_wait",run="r"} 10.0
# TYPE distrain_rank_data_wait_seconds counter
distrain_rank_data_wait_seconds_total{node="a",rank="0",run="r"} 1.0
distrain_rank_data_wait_seconds_total{node="b",rank="1",run="r"} 9.0
# TYPE distrain_rank_arrival_seconds counter
distrain_rank_arrival_seconds_total{node="a",rank="0",run="r"} 10.0
distrain_rank_arrival_seconds_total{node="b",rank="1",run="r"} 20.0
"""


@pytest.fixture
def page():
    """Serves a text that can be changed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.text.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.text = PAGE
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_sparkline():
    assert draw_sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert draw_sparkline([0, 0, 7, 7], 2) == "▁█"
    assert draw_sparkline([3.0, 3.0], 5) == "▅▅"
    assert draw_sparkline([math.nan, math.inf], 5) == ""
    assert len(draw_sparkline(list(range(1000)), 50)) <= 50


def test_a_page_as_it_is_shown(page):
    watch = RunWatcher(page.url)
    view = watch.refresh_view()
    text = "\n".join(render_lines(view, 80, now=1100.0))
    assert "step 40 of 400 (10%)" in text
    assert "1,234 images/s  2 workers  2 restarts" in text
    assert "forward               75.0%" in text
    assert "data_wait             25.0%" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert find_problems(view, 1100.0) == [
        "no progress for 100 s",
        "2 of 3 workers",
        "rank 1 waits for data 45% of its time",
        "rank 1 reaches the all-reduce 100% later than the median rank",
    ]


def test_the_width_of_what_is_shown(page):
    def count_blocks(**width):
        (line,) = [x for x in top(page.url, **width) if x.startswith("forward")]
        return line.count("█")

    # Three quarters of what is left beside name and value.
    assert count_blocks() == 38
    assert count_blocks(width=50) == 15


def test_what_was_spent_since_the_look_before(page):
    watch = RunWatcher(page.url)
    watch.refresh_view()
    page.text = PAGE.replace(
        'phase="forward",run="r"} 30', 'phase="forward",run="r"} 31'
    )
    page.text = page.text.replace('step{run="r"} 40', 'step{run="r"} 50')
    view = watch.refresh_view()
    assert view.compute_increase("phase_seconds_sum", "phase") == {
        "forward": 1.0,
        "data_wait": 0.0,
    }
    assert [step for step, _ in view.history["loss"]] == [40, 50]


def test_a_page_of_this_machine_is_read_around_proxies(page, proxy):
    assert RunWatcher(page.url).refresh_view().silent_pages == []
    assert proxy == []


def test_a_page_that_does_not_answer():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert find_problems(RunWatcher(url).refresh_view(), 0.0) == [
        f"{url}/metrics does not answer"
    ]


def test_a_run_directory(narrow, console, digits):
    """Of a run that has ended: its page is gone, its files tell."""
    config = narrow(epochs=2, log={"every": 1}, data={"val": str(digits / "val")})
    train(config, World(torch.device("cpu")), console)
    text = list(render_lines(RunWatcher(config.run).refresh_view(), 80))
    assert text[0].endswith("step 44")
    assert text[2] == (
        "no metrics page answers: all numbers are from the run directory"
    )
    (loss,) = [line for line in text if line.startswith("loss")]
    assert len(loss.split()[2]) >= 22
    assert any(line.startswith("validation top-1") for line in text)
    assert max(len(line) for line in text) <= 80


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match="is not a run directory: give one, or the URL"):
        RunWatcher(str(tmp_path))


def test_a_page_of_another_run_at_the_port_of_an_old_one_is_not_shown(page, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("")
    (tmp_path / "old/targets.json").write_text(
        json.dumps([{"targets": [page.url.removeprefix("http://")], "labels": {}}])
    )
    assert RunWatcher(str(tmp_path / "old")).refresh_view().get_value("step") is None
    (tmp_path / "old").rename(tmp_path / "r")
    assert RunWatcher(str(tmp_path / "r")).refresh_view().get_value("step") == 40


def test_a_counter_that_began_anew_has_no_negative_share(page):
    watch = RunWatcher(page.url)
    watch.refresh_view()
    page.text = PAGE.replace(
        'phase="forward",run="r"} 30.0', 'phase="forward",run="r"} 3.0'
    )
    assert watch.refresh_view().compute_increase("phase_seconds_sum", "phase") == {
        "forward": 3.0,
        "data_wait": 0.0,
    }

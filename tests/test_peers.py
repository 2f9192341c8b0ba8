"""A rank that is gone is noticed by all others, without a collective of theirs."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import await_that

RANKS = 4


class Ring:
    """Processes that watch each other, and what each has said."""

    def __init__(self, folder, environment):
        script = str(Path(__file__).parent / "one_peer.py")
        self._files = [folder / f"rank-{rank}.txt" for rank in range(RANKS)]
        self.processes = []
        for rank, path in enumerate(self._files):
            command = [sys.executable, script, str(folder / "store"), str(rank), str(RANKS)]
            with path.open("w") as out:
                pipes = {"stdin": subprocess.PIPE, "stdout": out, "text": True, "env": environment}
                self.processes.append(subprocess.Popen(command, **pipes))

    def await_words(self, *words, ranks=range(RANKS)):
        """Wait until these ranks have said this, and nothing else."""
        wanted = [list(words)] * len(ranks)
        await_that(lambda: [self._said(rank)[: len(words)] for rank in ranks] == wanted, f"{words} of {list(ranks)}")
        assert [self._said(rank) for rank in ranks] == wanted

    def tell(self, rank, text):
        self.processes[rank].stdin.write(f"{text}\n")
        self.processes[rank].stdin.flush()

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()

    def _said(self, rank):
        return self._files[rank].read_text().split()


@pytest.fixture
def ring(tmp_path, plain_environment):
    found = Ring(tmp_path, plain_environment)
    try:
        found.await_words("watching")
        yield found
    finally:
        found.end()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_is_noticed_by_all_others(ring, victim):
    ring.processes[victim].kill()
    others = [rank for rank in range(RANKS) if rank != victim]
    ring.await_words("watching", "lost", ranks=others)
    for rank in others:
        ring.tell(rank, "give up")
    ring.await_words("watching", "lost", "left", ranks=others)


def test_a_rank_that_stands_still_keeps_none_from_giving_up(ring):
    """As one whose host is cut off: nothing of it is closed."""
    ring.processes[2].send_signal(signal.SIGSTOP)
    ring.tell(1, "give up")
    ring.await_words("watching", "lost", "left", ranks=[1])


def test_a_rank_that_gives_up_takes_all_others_along(ring):
    ring.tell(1, "give up")
    ring.await_words("watching", "lost", ranks=[0, 2, 3])


def test_nobody_is_lost_where_all_leave_one_after_another(ring):
    for rank in range(RANKS):
        ring.tell(rank, "leave")
    ring.await_words("watching", "left")
    assert [process.wait(60) for process in ring.processes] == [0] * RANKS

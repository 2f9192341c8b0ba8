"""A rank that is gone is noticed by all others, without a collective of theirs."""

import signal

import pytest
from forks import Fork
from waiting import await_that

RANKS = 4


class Ring:
    """Processes that watch each other, and what each has said."""

    def __init__(self, folder):
        self.processes = []
        for rank in range(RANKS):
            arguments = (str(folder / "store"), str(rank), str(RANKS))
            self.processes.append(
                Fork("one_peer", *arguments, out=folder / f"rank-{rank}.txt")
            )

    def await_words(self, *words, ranks=range(RANKS)):
        """Wait until these ranks have said this, and nothing else."""
        wanted = [list(words)] * len(ranks)
        await_that(
            lambda: [self._said(rank)[: len(words)] for rank in ranks] == wanted,
            f"{words} of {list(ranks)}",
        )
        assert [self._said(rank) for rank in ranks] == wanted

    def end(self):
        for process in self.processes:
            process.end()

    def _said(self, rank):
        return self.processes[rank].out.split()


@pytest.fixture
def ring(tmp_path):
    found = Ring(tmp_path)
    try:
        found.await_words("watching")
        yield found
    finally:
        found.end()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_is_noticed_by_all_others(ring, victim):
    ring.processes[victim].send_signal(signal.SIGKILL)
    others = [rank for rank in range(RANKS) if rank != victim]
    ring.await_words("watching", "lost", ranks=others)
    for rank in others:
        ring.processes[rank].tell("give up")
    ring.await_words("watching", "lost", "left", ranks=others)


def test_a_rank_that_stands_still_keeps_none_from_giving_up(ring):
    """As one whose host is cut off: nothing of it is closed."""
    ring.processes[2].send_signal(signal.SIGSTOP)
    ring.processes[1].tell("give up")
    ring.await_words("watching", "lost", "left", ranks=[1])


def test_a_rank_that_gives_up_takes_all_others_along(ring):
    ring.processes[1].tell("give up")
    ring.await_words("watching", "lost", ranks=[0, 2, 3])


def test_nobody_is_lost_where_all_leave_one_after_another(ring):
    for rank in range(RANKS):
        ring.processes[rank].tell("leave")
    ring.await_words("watching", "left")
    assert [process.wait(60) for process in ring.processes] == [0] * RANKS

"""A rank that is gone is noticed by all others, without a collective of theirs."""

import subprocess
import sys
from pathlib import Path

import pytest

RANKS = 4


@pytest.fixture
def ring(tmp_path, plain_environment):
    """Processes that watch each other."""
    command = [sys.executable, str(Path(__file__).parent / "one_peer.py"), str(tmp_path / "store")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": plain_environment}
    found = [subprocess.Popen([*command, str(rank), str(RANKS)], **pipes) for rank in range(RANKS)]
    assert [process.stdout.readline() for process in found] == ["watching\n"] * RANKS
    yield found
    for process in found:
        process.kill()
        process.communicate()


def tell(process, text):
    process.stdin.write(f"{text}\n")
    process.stdin.flush()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_is_noticed_by_all_others(ring, victim):
    ring[victim].kill()
    others = [process for process in ring if process is not ring[victim]]
    assert [process.stdout.readline() for process in others] == ["lost\n"] * (RANKS - 1)
    for process in others:
        tell(process, "give up")
    assert [process.communicate(timeout=60)[0] for process in others] == ["left\n"] * (RANKS - 1), "told once"


def test_a_rank_that_gives_up_takes_all_others_along(ring):
    tell(ring[1], "give up")
    assert [process.stdout.readline() for process in ring] == ["lost\n"] * RANKS


def test_nobody_is_lost_where_all_leave_one_after_another(ring):
    for process in ring:
        tell(process, "leave")
    assert [process.communicate(timeout=60)[0] for process in ring] == ["left\n"] * RANKS
    assert [process.returncode for process in ring] == [0] * RANKS

"""Heartbeats of several ranks in one process. The tests count the beats instead of the threads."""

import io

import pytest
import torch.distributed as dist

from tritium.train.distributed import heartbeat
from tritium.train.distributed._beat import Process
from tritium.train.distributed.heartbeat import Heartbeat

pytestmark = pytest.mark.plain

TIMEOUT = 50  # a beat takes a second


class EndedError(Exception):
    """The verdict that ends all ranks."""


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks that have done one step."""

    def end(self, verdict):
        raise EndedError(verdict["line"])

    monkeypatch.setattr(Heartbeat, "_end", end)
    monkeypatch.setattr(Heartbeat, "_run", lambda self: None)
    store = dist.HashStore()
    ranks = [Heartbeat(store, rank, 3, TIMEOUT) for rank in range(3)]
    for each in ranks:
        each.mark(1)
    return ranks


def beat(ranks, count: int, *, silent: int | None = None) -> None:
    """Let all ranks but the silent one beat. Raises: EndedError if a rank ends."""
    for _ in range(count):
        for rank, each in enumerate(ranks):
            if rank != silent:
                each._round()


def test_the_rank_with_the_fewest_marks_hangs(ranks):
    for rank in (0, 2):
        ranks[rank].mark()
    with pytest.raises(EndedError, match=r"rank 1 hangs: no progress for 50 s \(.* is running\)"):
        beat(ranks, TIMEOUT + 10)


@pytest.mark.parametrize(("hung", "kills"), [(0, False), (1, True)])
def test_a_rank_that_names_itself_is_not_killed_before_it_prints(ranks, hung, kills, monkeypatch):
    """Rank 0 beats first, so it finds the hung rank."""
    verdicts = []
    monkeypatch.setattr(Heartbeat, "_decide", lambda self, verdict: verdicts.append(verdict))
    monkeypatch.setattr(Heartbeat, "_end", lambda self, verdict: None)
    for rank in {0, 1, 2} - {hung}:
        ranks[rank].mark()
    beat(ranks, TIMEOUT + 10)
    assert verdicts[0]["rank"] == hung
    assert verdicts[0]["found_by"] == 0
    assert verdicts[0]["kills"] is kills


def test_a_rank_that_has_left_is_not_killed(ranks, monkeypatch):
    verdicts = []
    monkeypatch.setattr(Heartbeat, "_decide", lambda self, verdict: verdicts.append(verdict))
    monkeypatch.setattr(Heartbeat, "_end", lambda self, verdict: None)
    ranks[1].leave()
    ranks[0]._lose(ranks[1]._beat())
    assert not verdicts[0]["kills"]


def test_a_rank_without_beats_hangs_even_if_it_has_more_marks(ranks):
    beat(ranks, 1)
    ranks[2].mark()
    with pytest.raises(EndedError, match=r"rank 2 hangs.*after 1 step,"):
        beat(ranks, TIMEOUT + 10, silent=2)


def test_other_ranks_wait_for_a_patient_rank(ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "_LONG_TIMEOUT", 3 * TIMEOUT)
    with ranks[0].patient():
        for rank in (1, 2):
            ranks[rank].mark()
            ranks[rank].mark()
        beat(ranks, 3 * TIMEOUT)
        with pytest.raises(EndedError, match="rank 0 hangs"):
            beat(ranks, 10)


def test_slow_steps_get_three_times_their_duration(ranks):
    for _ in range(2):
        beat(ranks, TIMEOUT - 10)
        for each in ranks:
            each.mark()
    beat(ranks, 2 * TIMEOUT)
    with pytest.raises(EndedError):
        beat(ranks, TIMEOUT)


def test_compilation_is_no_hang(ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "is_compiling", lambda: True)
    beat(ranks, 3 * TIMEOUT)
    monkeypatch.setattr(heartbeat, "is_compiling", lambda: False)
    with pytest.raises(EndedError, match="hangs"):
        beat(ranks, TIMEOUT + 10)


def test_a_rank_hangs_only_after_the_first_step(ranks):
    for each in ranks:
        each._step = None
    beat(ranks, 3 * TIMEOUT)
    for each in ranks:
        each.mark(1)
    with pytest.raises(EndedError, match="hangs"):
        beat(ranks, 10 * TIMEOUT)


def test_a_rank_that_has_left_is_not_missed(ranks):
    ranks[1].leave()
    for _ in range(3):
        beat(ranks, TIMEOUT - 10, silent=1)
        ranks[0].mark()
        ranks[2].mark()
    # Without the note that it left, its silence is a hang.
    ranks[1]._has_left = False
    ranks[1]._publish()
    with pytest.raises(EndedError, match="rank 1 hangs"):
        beat(ranks, TIMEOUT + 10, silent=1)


def test_hanging_ranks_are_named_before_a_rank_that_has_left(ranks):
    ranks[1].leave()
    with pytest.raises(EndedError, match="rank 0 hangs"):
        beat(ranks, TIMEOUT + 10, silent=1)


def test_a_rank_that_leaves_while_another_looks_for_it_has_not_died(ranks, monkeypatch):
    def leaves(process, host):
        ranks[1].leave()
        return "has ended"

    monkeypatch.setattr(Process, "state", leaves)
    ranks[0]._watch_next_rank()  # It does not raise.
    assert ranks[0]._listen([1])[0].has_left


def test_a_rank_can_leave_without_the_store(ranks, monkeypatch):
    def fail(*arguments):
        raise dist.DistError("rank 0 has ended")

    monkeypatch.setattr(ranks[1], "_publish", fail)
    ranks[1].leave()  # It does not raise.
    assert not ranks[1]._thread.is_alive()


def test_a_rank_exits_although_its_output_is_closed(ranks, monkeypatch):
    closed = io.StringIO()
    closed.close()
    statuses = []
    monkeypatch.setattr("os._exit", statuses.append)
    monkeypatch.setattr("sys.stdout", closed)
    ranks[0]._exit(3)
    assert statuses == [3]


def test_the_first_verdict_is_printed_and_ends_all_ranks(ranks, capsys):
    ranks[2].fail(ValueError("two\nlines"), is_input=False)
    with pytest.raises(EndedError, match="rank 2 failed: ValueError: two lines"):
        ranks[1].fail(RuntimeError("later"), is_input=False)
    with pytest.raises(EndedError, match="rank 2 failed"):
        ranks[0]._round()
    assert capsys.readouterr().err.count("tritium: ") == 1

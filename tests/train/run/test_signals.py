import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tritium.errors import InputError, InterruptedRun
from tritium.train.run.metrics import read_metrics
from tritium.train.run.signals import set_time_limit, stop_on_signals

pytestmark = pytest.mark.plain


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(tiny, launch, tmp_path):
    run = tmp_path / "run"
    endless = []
    for name in ("--steps", "--checkpoint-interval", "--eval-interval"):
        endless += [name, 1_000_000]
    status, out, errors = launch(
        2, *tiny[1:], *endless, "--parallel", "fsdp", signal=[run, 1, signal.SIGTERM]
    )
    assert status == [143, 143], errors
    assert f"torchrun ... -m tritium.train --resume {run}" in out[0]
    assert out[1] == ""
    # One line, when all ranks have agreed which step is the last.
    assert errors[0].count("stopping; a checkpoint will be written") == 1
    assert errors[1] == ""
    step = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert [row["step"] for row in read_metrics(run)[0]] == list(range(step))


def test_handlers_are_set_in_the_context_only():
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(InterruptedRun) as stopped, stop_on_signals():
        signal.raise_signal(signal.SIGUSR1)
    assert stopped.value.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_time_limits_of_any_length_are_accepted():
    @stop_on_signals()
    def wait(limit: float, seconds: float) -> None:
        set_time_limit(limit)
        threading.Event().wait(seconds)

    wait(1e300, 0)
    with pytest.raises(InterruptedRun) as stopped:
        wait(-5, 10)
    assert stopped.value.number == signal.SIGALRM
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_thread_has_no_handlers_and_no_time_limit():
    def work():
        with stop_on_signals():
            set_time_limit(1e-3)

    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="max_minutes: expected"):
        pool.submit(work).result()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

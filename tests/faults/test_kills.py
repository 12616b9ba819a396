"""Runs that are killed at random moments, and started again by the same command."""

import random
import shutil
import time
from pathlib import Path

import pytest

from tritium.train.run.checkpoint import checkpoints

pytestmark = [pytest.mark.plain, pytest.mark.slow]

STEPS, INTERVAL = 100, 5
# Writes the number of steps that have ended to the file `reached`.
COUNT = """
reached = os.open({reached!r}, os.O_WRONLY | os.O_CREAT)
backward, finish = trainer.Trainer.backward, trainer.Trainer.update

def noted(self, batch, num_targets=None, *, step=0):
    self.ended = step + 1
    return backward(self, batch, num_targets, step=step)

def update(self, lr):
    norm = finish(self, lr)
    os.pwrite(reached, b'%8d' % self.ended, 0)
    return norm

trainer.Trainer.backward, trainer.Trainer.update = noted, update
"""


def contents(run: Path) -> dict[int, dict[str, bytes]]:
    return {
        step: {file.name: file.read_bytes() for file in folder.iterdir()}
        for step, folder in checkpoints(run).items()
    }


def test_runs_killed_at_random_moments_end_bitwise_equal(
    begin, words, tmp_path, request, record_property
):
    """Each run is killed until it ends. New runs begin until the number of kills is reached."""
    count = kills = request.config.getoption("kills", 20)
    reached = tmp_path / "reached"
    hook = COUNT.format(reached=str(reached))
    words += ["--steps", STEPS, "--checkpoint-interval", INTERVAL, "--eval-interval", 10**6]

    # A run that nobody kills. Its time decides when other runs are killed.
    unbroken = tmp_path / "unbroken"
    process = begin([*words, "--out", unbroken, "--keep-checkpoints", STEPS], hook)
    began = time.monotonic()
    assert process.wait(300) == 0, process.output
    duration = time.monotonic() - began
    expected = contents(unbroken)
    assert len(expected) == STEPS // INTERVAL + 1

    moments = random.Random(0)
    lost = [0]
    run = tmp_path / "run"
    while kills > 0:
        reached.write_bytes(b"0")
        is_ended = False
        while not is_ended:
            process = begin([*words, "--out", run, "--resume", "auto"], hook)
            status = process.wait(moments.uniform(0, duration) if kills > 0 else 300)
            assert status in (0, None), process.output  # None: killed
            is_ended = status == 0
            kills -= not is_ended
            found = contents(run)
            for step, files in found.items():
                assert files == expected[step], f"step {step} is damaged"
            lost.append(int(reached.read_bytes()) - max(found, default=0))
            # A checkpoint that is being written when the process dies does not count.
            assert lost[-1] <= 2 * INTERVAL
        # The next process deletes the files that a killed process left over.
        names = {path.name for path in (run / "checkpoints").iterdir()}
        assert names == {f"step-{STEPS - INTERVAL}", f"step-{STEPS}"}
        assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
        assert found[STEPS] == expected[STEPS]
        shutil.rmtree(run)
    record_property("faults", count)
    record_property("recovered", count)
    record_property("steps_lost", max(lost))

"""Runs that are killed at random moments, and started again by the same command."""

import random
import shutil
import time
from pathlib import Path

import pytest

from tritium.train.run.checkpoint import checkpoints

pytestmark = [pytest.mark.plain, pytest.mark.slow]

STEPS, INTERVAL = 100, 5
# Writes two numbers to the file `reached`: the steps that have ended, and the step of the
# checkpoint that was begun last.
COUNT = """
from tritium.train.run import saver
reached = os.open({reached!r}, os.O_WRONLY | os.O_CREAT)
backward, finish = trainer.Trainer.backward, trainer.Trainer.update
save = saver.CheckpointSaver.save

def noted(self, batch, num_targets=None, *, step=0):
    self.ended = step + 1
    return backward(self, batch, num_targets, step=step)

def update(self, lr):
    norm = finish(self, lr)
    os.pwrite(reached, b'%8d' % self.ended, 0)
    return norm

def begun(self, step, **options):
    self.wait()
    os.pwrite(reached, b'%8d' % step, 8)
    return save(self, step, **options)

trainer.Trainer.backward, trainer.Trainer.update = noted, update
saver.CheckpointSaver.save = begun
"""


def contents(run: Path) -> dict[int, dict[str, bytes]]:
    return {
        step: {file.name: file.read_bytes() for file in folder.iterdir()}
        for step, folder in checkpoints(run).items()
    }


@pytest.fixture
def kill_at_random(begin, words, tmp_path, request, record_property):
    """Kill runs at random moments. Compare them with a run that nobody kills.

    Each run is killed until it ends. New runs begin until the number of kills is reached.

    Returns: two numbers per process: the steps that ended since the newest checkpoint, and since
        the checkpoint that was begun last.
    """

    def call(*more) -> list[tuple[int, int]]:
        count = kills = request.config.getoption("kills", 20)
        reached = tmp_path / "reached"
        hook = COUNT.format(reached=str(reached))
        command = [*words, "--steps", STEPS, "--checkpoint-interval", INTERVAL]
        command += ["--eval-interval", 10**6, *more]

        # A run that nobody kills. Its time decides when other runs are killed.
        unbroken = tmp_path / "unbroken"
        process = begin([*command, "--out", unbroken, "--keep-checkpoints", STEPS], hook)
        began = time.monotonic()
        assert process.wait(300) == 0, process.output
        duration = time.monotonic() - began
        expected = contents(unbroken)
        assert len(expected) == STEPS // INTERVAL + 1

        moments = random.Random(0)
        lost = []
        run = tmp_path / "run"
        while kills > 0:
            reached.write_bytes(b"%8d%8d" % (0, 0))
            is_ended = False
            while not is_ended:
                process = begin([*command, "--out", run, "--resume", "auto"], hook)
                status = process.wait(moments.uniform(0, duration) if kills > 0 else 300)
                assert status in (0, None), process.output  # None: killed
                is_ended = status == 0
                kills -= not is_ended
                found = contents(run)
                for step, files in found.items():
                    assert files == expected[step], f"step {step} is damaged"
                ended, begun = map(int, reached.read_bytes().decode().split())
                lost.append((ended - max(found, default=0), ended - begun))
            # The next process deletes the files that a killed process left over.
            names = {path.name for path in (run / "checkpoints").iterdir()}
            assert names == {f"step-{STEPS - INTERVAL}", f"step-{STEPS}"}
            assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
            assert not [path for path in run.iterdir() if path.name.startswith(".")]
            assert found[STEPS] == expected[STEPS]
            shutil.rmtree(run)
        record_property("faults", count)
        record_property("recovered", count)
        record_property("steps_lost", max(steps for steps, _ in lost))
        return lost

    return call


def test_a_run_killed_at_random_loses_at_most_the_interval(kill_at_random):
    """If it waits until each checkpoint is written."""
    for steps, _ in kill_at_random("--no-background-checkpoints"):
        assert steps <= INTERVAL


def test_a_run_killed_at_random_loses_at_most_the_interval_and_the_steps_of_a_write(
    kill_at_random,
):
    """The default: checkpoints are written in the background."""
    for steps, since_begun in kill_at_random():
        # If the checkpoint that was begun last is complete, it is the newest.
        assert steps in (since_begun, since_begun + INTERVAL)
        assert since_begun <= INTERVAL

"""Fine-tuning runs that are killed, and continue."""

import json
import signal

import pytest

pytestmark = [pytest.mark.plain, pytest.mark.slow]

STEPS = 12
# Kills the process after its update of this number.
KILL = """
update, done = trainer.Trainer.update, []

def killed(self, lr):
    norm = update(self, lr)
    done.append(lr)
    if len(done) == {number}:
        os.kill(os.getpid(), 9)
    return norm

trainer.Trainer.update = killed
"""


@pytest.fixture
def command(begin, words, tmp_path) -> list[str]:
    """Words of a run that fine-tunes a small model."""
    base = tmp_path / "base"
    process = begin([*words, "--context-tokens", "64", "--out", str(base)], name="base-log")
    assert process.wait(120) == 0, process.output
    records = tmp_path / "records.jsonl"
    lines = [{"instruction": f"say {i}", "output": f"{i} and {i}"} for i in range(40)]
    records.write_text("\n".join(map(json.dumps, lines)))
    return [
        *("finetune", "instruct", str(base), "--data", str(records), "--device", "cpu"),
        *("--steps", str(STEPS), "--batch-size", "4", "--checkpoint-interval", "5"),
        *("--dropout", "0.1", "--answer-tokens", "3", "--sample-tokens", "3"),
    ]


@pytest.mark.parametrize("number", [3, 8, STEPS], ids="update {}".format)
def test_a_killed_run_ends_bitwise_like_an_unbroken_one(number, command, begin, tmp_path):
    """The first kill comes before, between or after checkpoints, the second soon after it."""
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    process = begin([*command, "--out", str(unbroken)], name="unbroken-log")
    assert process.wait(120) == 0, process.output
    process = begin([*command, "--out", str(run)], KILL.format(number=number), name="killed-log")
    assert process.wait(120) == -signal.SIGKILL, process.output
    resume = ["finetune", "--resume", str(run)]
    process = begin(resume, KILL.format(number=2), name="again-log")
    assert process.wait(120) == -signal.SIGKILL, process.output
    process = begin(resume, name="resumed-log")
    assert process.wait(120) == 0, process.output
    for file in ("model.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-{STEPS}/{file}"
        assert (run / path).read_bytes() == (unbroken / path).read_bytes()
    assert (run / "answers.jsonl").read_bytes() == (unbroken / "answers.jsonl").read_bytes()

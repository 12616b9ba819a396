"""Bad steps: each run is compared with one that leaves the same steps out."""

import json
import socket

import pytest

pytestmark = [pytest.mark.plain, pytest.mark.slow]

# At step 7 the loss of rank 1 is NaN. At step 9, the last before a checkpoint, all gradients are
# infinite. In float16 that would be an overflow.
BAD = """
backward = trainer.Trainer.backward

def bad(self, batch, num_targets=None, *, step=0):
    if (step, self.engine.world.rank) == (7, 1):
        original = trainer.batch_loss
        trainer.batch_loss = lambda *arguments: original(*arguments) * torch.nan
        loss = backward(self, batch, num_targets, step=step)
        trainer.batch_loss = original
        return loss
    return backward(self, batch, num_targets, step=step)

trainer.Trainer.backward = bad
finish = trainer.Trainer.update

def update(self, lr):
    self.count = getattr(self, 'count', -1) + 1
    if self.count == 9:
        for parameter in self.model.parameters():
            parameter.grad.mul_(torch.inf)
    return finish(self, lr)

trainer.Trainer.update = update
"""
# At one step the loss or all gradients are multiplied.
BAD_ONCE = """
bad_step, where, value = {step}, {where!r}, float({value!r})
backward = trainer.Trainer.backward

def bad(self, batch, num_targets=None, *, step=0):
    if step != bad_step:
        return backward(self, batch, num_targets, step=step)
    original = trainer.batch_loss
    if where == 'loss':
        trainer.batch_loss = lambda *arguments: original(*arguments) * value
    loss = backward(self, batch, num_targets, step=step)
    trainer.batch_loss = original
    if where == 'gradients':
        for parameter in self.model.parameters():
            parameter.grad.mul_(value)
    return loss

trainer.Trainer.backward = bad
"""
LEFT_OUT = """
backward, finish = trainer.Trainer.backward, trainer.Trainer.update

def seen(self, batch, num_targets=None, *, step=0):
    self.is_left_out = step in (7, 9)
    if self.is_left_out:
        return torch.zeros(())
    return backward(self, batch, num_targets, step=step)

def update(self, lr):
    return torch.zeros(()) if self.is_left_out else finish(self, lr)

trainer.Trainer.backward, trainer.Trainer.update = seen, update
"""


@pytest.fixture
def run_ranks(begin, words):
    """Train on two ranks after a hook. Raise AssertionError unless both end with status 0."""

    def call(hook: str, run, *more) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in (0, 1):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            setup = f"os.environ.update({ {name: str(x) for name, x in variables.items()} })\n"
            name = f"{run.name}-{rank}"
            processes.append(begin([*words, "--out", run, *more], setup + hook, name))
        status = [process.wait(60) for process in processes]
        assert status == [0, 0], "".join(process.output for process in processes)

    return call


@pytest.mark.parametrize(
    "more",
    [
        ["--parallel", "fsdp"],
        ["--parallel", "ddp"],
        ["--parallel", "zero1", "--optimizer", "muon"],
        ["--parallel", "fsdp", "--precision", "float16"],
        ["--parallel", "zero1", "--precision", "float16"],
    ],
    ids=" ".join,
)
def test_all_ranks_skip_bad_steps(more, run_ranks, tmp_path, record_property):
    bad, never = tmp_path / "bad", tmp_path / "never"
    is_float16 = "float16" in more
    hook = BAD.replace("self.count == 9", "False") if is_float16 else BAD
    left_out = LEFT_OUT.replace("(7, 9)", "(7,)") if is_float16 else LEFT_OUT
    run_ranks(hook, bad, *more)
    run_ranks(left_out, never, *more)
    for file in ("step-10/model", "step-20/model", "step-20/optimizer"):
        found, expected = (
            (run / "checkpoints" / f"{file}.safetensors").read_bytes() for run in (bad, never)
        )
        assert found == expected
    assert skipped_steps(bad) == ([7] if is_float16 else [7, 9])
    record_property("faults", 1 if is_float16 else 2)
    record_property("recovered", 1 if is_float16 else 2)


@pytest.mark.parametrize(
    ("where", "value", "step", "more"),
    [
        ("loss", "nan", 7, []),
        ("gradients", "inf", 9, []),
        ("loss", "nan", 9, ["--precision", "float16"]),
        ("loss", "1e6", 79, ["--steps", 90]),
        ("gradients", "1e6", 79, ["--steps", 90, "--optimizer", "muon"]),
    ],
    ids=str,
)
def test_one_process_skips_a_bad_step(
    where, value, step, more, begin, words, tmp_path, record_property
):
    """Steps 9 and 79 are the last before a checkpoint. 1e6 is an outlier after 64 steps."""
    hooks = {
        "bad": BAD_ONCE.format(step=step, where=where, value=value),
        "never": LEFT_OUT.replace("(7, 9)", f"({step},)"),
    }
    for name, hook in hooks.items():
        process = begin([*words, "--out", tmp_path / name, *more], hook, name=f"process-{name}")
        assert process.wait() == 0, process.output
    last = 90 if step == 79 else 20
    for file in (f"step-{last - 10}/model", f"step-{last}/model", f"step-{last}/optimizer"):
        found, expected = (
            (tmp_path / name / "checkpoints" / f"{file}.safetensors").read_bytes() for name in hooks
        )
        assert found == expected
    assert skipped_steps(tmp_path / "bad") == [step]
    record_property("faults", 1)
    record_property("recovered", 1)


def skipped_steps(run) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line.get("skipped")]

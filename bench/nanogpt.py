"""tritium beside nanoGPT on this CPU: the same small model, the same text, the same schedule, the same minutes.

    python -m tritium.bench.nanogpt NANOGPT_CHECKOUT TEXT_FILE [--rounds 2] [--steps 2000] [--out results.json]

Both train 4 layers x 4 heads x width 128 on 12 x 64 characters a step with the settings that nanoGPT's README gives for a CPU.
A shared machine's speed can change by a third from one half minute to the next, so they run at once but never together: one
is stopped while the other has three seconds of the machine, in turn. Steps a second are the median over the steps while both
were running, which passes over those that a stop or an evaluation made longer; nanoGPT's come from the times that it prints.
Its own validation loss is over 20 sampled batches, ours over the whole held-out tenth, and nanoGPT's last checkpoint is scored
over that tenth too.
"""

import argparse
import contextlib
import itertools
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ..train.log import read_metrics
from .record import write_record

STEPS = 2_000
CONTEXT_TOKENS, BATCH = 64, 12
# Longer than the ten steps over which tritium's metrics average, shorter than a shared machine's moods.
SLICE_SECONDS = 3.0

# Run inside the checkout: scores its newest checkpoint over val.bin in windows that do not overlap.
_SCORE = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
data = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
T = saved["model_args"]["block_size"]
windows = (len(data) - 1) // T
x, y = data[: windows * T].view(windows, T), data[1 : windows * T + 1].view(windows, T)
with torch.no_grad():
    losses = [model(a, b)[1].item() * len(a) for a, b in zip(x.split(64), y.split(64))]
print("SCORE", sum(losses) / windows)
"""


def run_both(checkout: Path, text: Path, steps: int, folder: Path) -> tuple[dict, dict]:
    """Train with nanoGPT and with tritium, a slice of time each in turn; returns nanoGPT's and tritium's figures.

    These are the seconds of the steps while both ran, and the validation losses.
    """
    options = {
        "device": "cpu", "compile": "False", "eval_iters": 20, "log_interval": 1, "block_size": CONTEXT_TOKENS,
        "batch_size": BATCH, "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": steps, "lr_decay_iters": STEPS,
        "dropout": 0.0, "out_dir": "out", "always_save_checkpoint": "True",
    }  # fmt: skip
    theirs = ["train.py", "config/train_shakespeare_char.py", *(f"--{name}={value}" for name, value in options.items())]
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    ours = ["-m", "tritium", "train", "shakespeare-char", "--data", str(text), "--device", "cpu", "--out", str(run)]
    output, _ = _in_turn((theirs, checkout), ([*ours, "--steps", str(steps)], folder))

    # A step that ends with an evaluation has it in its printed time: the median passes over these.
    their_times = [float(ms) / 1e3 for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", output)][1:]
    rows, evaluations = read_metrics(run)
    our_times = [BATCH * CONTEXT_TOKENS / row["tokens_per_second"] for row in rows][1:]
    shared = min(sum(their_times), sum(our_times))
    score = re.search(r"SCORE ([\d.]+)", _python(["-c", _SCORE], checkout))
    return (
        {
            "seconds": _first(their_times, shared),
            "sampled_val_loss": float(re.findall(r"val loss ([\d.]+)", output)[-1]),
            "val_loss": float(score.group(1)),
        },
        {"seconds": _first(our_times, shared), "val_loss": evaluations[-1]["val_loss"]},
    )


def _first(times: list[float], seconds: float) -> list[float]:
    """The first of `times`, up to a sum of `seconds`, and at least one."""
    return [time for time, end in zip(times, itertools.accumulate(times), strict=True) if end <= seconds] or times[:1]


def _in_turn(*programs: tuple[list[str], Path]) -> list[str]:
    """Run Python with each program's words in its folder, all but one stopped at any time; returns what they printed."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in programs]
        running = []
        for (words, folder), file in zip(programs, files, strict=True):
            running.append(subprocess.Popen([sys.executable, *words], cwd=folder, stdout=file, stderr=subprocess.STDOUT))
            stack.callback(running[-1].kill)
            running[-1].send_signal(signal.SIGSTOP)
        for process in itertools.cycle(running):
            if all(process.poll() is not None for process in running):
                break
            process.send_signal(signal.SIGCONT)  # nothing happens to one that has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SLICE_SECONDS)
            process.send_signal(signal.SIGSTOP)
        outputs = []
        for (words, _), process, file in zip(programs, running, files, strict=True):
            file.seek(0)
            outputs.append(file.read())
            if process.returncode:
                sys.exit(f"nanogpt: {' '.join(words[:3])} failed:\n{outputs[-1][-2000:]}")
        return outputs


def prepare_checkout(checkout: Path, text: Path, folder: Path) -> Path:
    """A copy of the checkout with its character data made from `text`, so that nothing is downloaded or written there."""
    if not (checkout / "train.py").is_file():
        sys.exit(f"nanogpt: expected a nanoGPT checkout with train.py, found none in {checkout}")
    copy = folder / "nanoGPT"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "out*"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    # prepare.py imports requests for a download that input.txt makes needless.
    (data / "requests.py").write_text("")
    _python([str(data / "prepare.py")], copy)
    return copy


def compare(checkout: Path, text: Path, *, rounds: int, steps: int) -> dict:
    """Run the pair `rounds` times and put the figures side by side."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy = prepare_checkout(checkout, text, folder)
        pairs = [run_both(copy, text, steps, folder) for _ in range(rounds)]
    results = dict(zip(("nanogpt", "tritium"), zip(*pairs, strict=True), strict=True))
    rates = {name: [1 / statistics.median(run["seconds"]) for run in runs] for name, runs in results.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["tritium"], rates["nanogpt"], strict=True)]
    return {
        "steps": steps,
        "rounds": rounds,
        "steps_per_second": {name: statistics.median(by_round) for name, by_round in rates.items()},
        "steps_per_second_by_round": rates,
        "ratio": statistics.median(ratios),
        "ratio_by_round": ratios,
        "val_loss": {name: [run["val_loss"] for run in runs] for name, runs in results.items()},
        "nanogpt_sampled_val_loss": [run["sampled_val_loss"] for run in results["nanogpt"]],
    }


def _python(words: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"nanogpt: {' '.join(words[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    """Parse the command line, compare, print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m tritium.bench.nanogpt", description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkout", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--rounds", type=int, default=2, help="how often the pair is run (default 2)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each run (default {STEPS})")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    result = compare(options.checkout.resolve(), options.text.resolve(), rounds=options.rounds, steps=options.steps)
    print(json.dumps(result, indent=1))
    if options.out:
        write_record(options.out, "nanogpt", result)


if __name__ == "__main__":
    main()

"""tritium beside nanoGPT on this CPU: the same small model, the same text, the same schedule, one run after the other.

    python -m tritium.bench.nanogpt NANOGPT_CHECKOUT TEXT_FILE [--rounds 2] [--steps 2000] [--out results.json]

Both train 4 layers x 4 heads x width 128 on 12 x 64 characters a step with the settings that nanoGPT's README gives for a CPU.
Rounds alternate and each is compared with the one beside it, so that a machine that slows down for minutes slows both; the
ratio is the median of the rounds'. Steps a second of a round are the median over its steps, evaluation left out of both;
nanoGPT's come from the times that it prints. Its own validation loss is over 20 sampled batches,
ours over the whole held-out tenth, and nanoGPT's last checkpoint is scored over that tenth too.
"""

import argparse
import datetime
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

STEPS = 2_000
CONTEXT_TOKENS, BATCH = 64, 12

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


def run_nanogpt(checkout: Path, steps: int) -> dict:
    """Train nanoGPT for `steps`; returns seconds of each step, its sampled validation loss and that over the whole tenth."""
    options = {
        "device": "cpu", "compile": "False", "eval_iters": 20, "log_interval": 1, "block_size": CONTEXT_TOKENS,
        "batch_size": BATCH, "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": steps, "lr_decay_iters": STEPS,
        "dropout": 0.0, "out_dir": "out", "always_save_checkpoint": "True",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    output = _python(["train.py", "config/train_shakespeare_char.py", *words], checkout)
    times = [float(ms) / 1e3 for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", output)]
    evaluations = re.findall(r"val loss ([\d.]+)", output)
    # A step that ends with an evaluation has it in its printed time: the median passes over these.
    score = re.search(r"SCORE ([\d.]+)", _python(["-c", _SCORE], checkout))
    return {"seconds": times[1:], "sampled_val_loss": float(evaluations[-1]), "val_loss": float(score.group(1))}


def run_tritium(text: Path, steps: int, folder: Path) -> dict:
    """Train tritium's shakespeare-char recipe for `steps`; returns the same things."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    words = ["-m", "tritium", "train", "shakespeare-char", "--data", str(text), "--device", "cpu", "--out", str(run)]
    _python([*words, "--steps", str(steps)], folder)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [BATCH * CONTEXT_TOKENS / row["tokens_per_second"] for row in rows if "loss" in row]
    return {"seconds": times[1:], "val_loss": [row["val_loss"] for row in rows if "val_loss" in row][-1]}


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
    """Run both `rounds` times in turn and put the figures side by side."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy = prepare_checkout(checkout, text, folder)
        results = {"nanogpt": [], "tritium": []}
        for _ in range(rounds):
            results["nanogpt"].append(run_nanogpt(copy, steps))
            results["tritium"].append(run_tritium(text, steps, folder))
    rates = {name: [1 / statistics.median(run["seconds"]) for run in runs] for name, runs in results.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["tritium"], rates["nanogpt"], strict=True)]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": steps,
        "rounds": rounds,
        "steps_per_second": {name: statistics.median(by_round) for name, by_round in rates.items()},
        "steps_per_second_by_round": rates,
        "ratio": statistics.median(ratios),
        "ratio_by_round": ratios,
        "val_loss": {name: [run["val_loss"] for run in runs] for name, runs in results.items()},
        "nanogpt_sampled_val_loss": [run["sampled_val_loss"] for run in results["nanogpt"]],
    }


def _cpu() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", file.read_text(), flags=re.MULTILINE) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    """What git says of the checkout this file is in; None outside of one."""
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


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
    parser.add_argument("--rounds", type=int, default=2, help="how often both are run, in turn (default 2)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each run (default {STEPS})")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    result = compare(options.checkout.resolve(), options.text.resolve(), rounds=options.rounds, steps=options.steps)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

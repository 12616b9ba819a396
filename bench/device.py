"""The parts of bench/device.sh: what each of its commands runs, and for how long.

A command takes at most TOTAL_SECONDS. Each part is a program with a deadline in seconds after the
start of the command. A part that ends early leaves its time to the next parts. A part that is
stopped leaves its results so far. Two files are written after each part and every SAVE_SECONDS, so
that a command that is killed leaves them too:

    OUT_DIR/COMMAND.json      how each part ended, and every JSON that the parts wrote
    OUT_DIR/COMMAND.tar.gz    logs and plots

The files of the parts are in OUT_DIR/COMMAND/. Commit COMMAND.json under bench/results/GPU/:
`tritium bench report` reads the records in it.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .record import write_record

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 535
SHORT_SECONDS = 430
SAVE_SECONDS = 15
# Lines of each log that are printed: the last ones.
LOG_LINES = 40
# Every kernel once, in float32 and bfloat16.
KERNEL_TESTS = "(accura or bits or packed_documents or last_rows) and not fp16"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program of a command.

    Attributes:
        name: of its log, NAME.log.
        words: its arguments. FOLDER stands for the folder of the command's files, PYTHON for this
            Python.
        until: its deadline, seconds after the start of the command.
        program: the program, if it is not Python.
        together: whether to run at the same time as the part before. Such parts are not timed.
    """

    name: str
    words: tuple[str, ...]
    until: int
    program: str | None = None
    together: bool = False


def _part(name: str, until: int, words: str, *more: str, program: str | None = None) -> Part:
    return Part(name=name, words=(*words.split(), *more), until=until, program=program)


def _tritium(name: str, until: int, words: str) -> Part:
    return _part(name, until, f"-m tritium {words}")


def _pytest(name: str, until: int, workers: int, words: str, *more: str) -> Part:
    return _part(name, until, f"-m pytest -p no:cacheprovider -n {workers} -rfE {words}", *more)


# --- the commands


def correct(rehearse: bool) -> list[Part]:
    """Return the parts that show whether everything works, before anything is timed."""
    if rehearse:
        tests = _pytest("tests", 500, 0, "tests/kernels/norm/test_layer_norm.py -k", "plan or cost")
        machine = "shakespeare-char --device cpu --micro-batch-size 1"
        run = (
            "shakespeare-char --data train --tokenizer bytes --device cpu --steps 2 --n-layer 1 "
            "--eval-tokens 64 --sample-tokens 2"
        )
    else:
        tests = _pytest("tests", 400, 14, "tests/kernels -m", "not codegen", "-k", KERNEL_TESTS)
        machine = "gpt2 --micro-batch-size 8"
        run = (
            "gpt2 --data stdlib --tokenizer bytes --steps 20 --batch-size 32 --eval-interval 20 "
            "--eval-tokens 65536 --compile off"
        )
    return [
        _tritium("info", 30, "info"),
        _tritium("machine", 180, f"bench machine {machine} --out FOLDER/machine.json"),
        tests,
        _tritium("run", TOTAL_SECONDS, f"train {run} --out FOLDER/run"),
    ]


def train(rehearse: bool) -> list[Part]:
    """Return the parts that measure training, and compare a profile with the prediction."""
    if rehearse:
        tiny = "shakespeare-char --device cpu --steps 1 --micro-batch-size 1"
        return [
            _tritium("train", 400, f"bench train {tiny} --out FOLDER/train.json"),
            _tritium(
                "profile",
                TOTAL_SECONDS,
                "bench predict shakespeare-char --batch-size 2 --measure 1 "
                "--out FOLDER/profile.json",
            ),
        ]
    # Only tritium's own attention: each further attention is one more model to compile. A nanoGPT
    # checkout takes part if one was copied here.
    nanogpt = " --nanogpt .nanogpt" if (ROOT / ".nanogpt").is_dir() else ""
    models = f"bench train gpt2 --attention{nanogpt} --steps 60"
    return [
        _tritium("train-32", 250, f"{models} --micro-batch-size 32 --out FOLDER/train-32.json"),
        _tritium(
            "profile",
            360,
            "bench predict gpt2 --batch-size 64 --micro-batch-size 64 --measure 5 "
            "--out FOLDER/profile.json",
        ),
        # Last, because the logits of the baselines may not fit into the memory of an H100.
        _tritium(
            "train-64",
            TOTAL_SECONDS,
            f"{models} --micro-batch-size 64 --out FOLDER/train-64.json",
        ),
    ]


# Operators, and the shapes at which they are timed: GPT-2 124M with 64 sequences, other widths and
# longer sequences. No shapes: the operators' own.
KERNEL_SHAPES = (
    ("layer_norm add_layer_norm", "65536x768 32768x1600"),
    ("causal_attention", "64x1024x12x64 4x8192x12x64 8x4096x16x128"),
    ("gelu_mlp", "65536x768 32768x1600"),
    ("cross_entropy", "8192x50304"),
    ("linear_cross_entropy", "65536x768x50257"),
    ("embedding", "64x1024x768x50304"),
    ("rms_norm add_rms_norm rotary causal_attention_varlen attention_decode swiglu_mlp", ""),
)


def kernels(rehearse: bool) -> list[Part]:
    """Return the parts that time operators at a few shapes, without torch.compile."""
    rows = (("layer_norm", "8x64"),) if rehearse else KERNEL_SHAPES
    options = "--without torch.compile" + " --device cpu --rounds 2" * rehearse
    parts = []
    for number, (operators, shapes) in enumerate(rows, start=1):
        name = operators.split()[0]
        shape = f"--shape {shapes}" if shapes else ""
        parts.append(
            _tritium(
                name,
                number * TOTAL_SECONDS // len(rows),
                f"bench kernels {operators} {shape} {options} --out FOLDER/{name}",
            )
        )
    return parts


# Operator, its shape, the variants to compare, and the deadline. No variants: all.
TUNED = (
    ("causal_attention", "64x1024x12x64", "", 220),
    ("linear_cross_entropy", "65536x768x50257", "", 360),
    ("cross_entropy", "8192x50304", "", 420),
    ("layer_norm", "65536x768", "", 450),
    ("embedding", "64x1024x768x50304", "", 480),
    ("gelu_mlp", "65536x768", "cublas", TOTAL_SECONDS),
)


def tune(rehearse: bool) -> list[Part]:
    """Return the parts that compare launch sizes."""
    rows = (("layer_norm", "8x64", "", TOTAL_SECONDS),) if rehearse else TUNED
    options = " --device cpu --rounds 1" * rehearse
    parts = []
    for operator, shape, variants, until in rows:
        variant = f"--variant {variants}" if variants else ""
        words = f"--shape {shape} {variant}{options} --out FOLDER/{operator}.json"
        parts.append(_tritium(operator, until, f"bench tune {operator} {words}"))
    return parts


def later(rehearse: bool) -> list[Part]:
    """Return the parts that can wait: all tests, a race detector, torch.compile's kernels."""
    if rehearse:
        return [_pytest("tests", TOTAL_SECONDS, 0, "tests/kernels/test_rotary.py -k", "plan")]
    race = "--tool racecheck --error-exitcode 1 PYTHON -m pytest -p no:cacheprovider -x"
    some = "accura and bf16 and (layer_norm or rotary or cross_entropy)"
    return [
        _pytest("tests", 300, 14, "tests/kernels -m", "not codegen"),
        _part("races", 400, f"{race} tests/kernels -k", some, program="compute-sanitizer"),
        _tritium(
            "compiled",
            TOTAL_SECONDS,
            "bench kernels layer_norm gelu_mlp cross_entropy --out FOLDER/compiled",
        ),
    ]


def short(rehearse: bool) -> list[Part]:
    """Return the parts that decide most, in seven minutes: for a GPU that is lent for minutes.

    The first parts run at the same time. They test the kernels, and they compile what the later
    parts time, so that those find it in the caches.
    """
    if rehearse:
        tiny = "--shape 8x64 --device cpu --rounds 1"
        return [
            _tritium("info", 30, "info"),
            replace(_tritium("fill", 60, f"bench tune layer_norm {tiny}"), together=True),
            _tritium("layer_norm", SHORT_SECONDS, f"bench tune layer_norm {tiny}"),
        ]
    nanogpt = " --nanogpt .nanogpt" if (ROOT / ".nanogpt").is_dir() else ""
    models = f"bench train gpt2 --attention{nanogpt} --micro-batch-size 32"
    some = "(accura or bits or packed_documents or last_rows) and bf16"
    attention = "causal_attention --shape 64x1024x12x64"
    mlp = "gelu_mlp --shape 65536x768"
    loss = "linear_cross_entropy --shape 65536x768x50257"
    first = [
        _tritium("info", 30, "info"),
        _pytest("tests", 170, 8, "tests/kernels -v -m", "not codegen", "-k", some),
        _tritium(
            "run",
            170,
            "train gpt2 --data stdlib --tokenizer bytes --steps 20 --batch-size 32 "
            "--eval-interval 20 --eval-tokens 65536 --compile off --out FOLDER/run",
        ),
        _tritium("fill-train", 170, f"{models} --steps 1"),
        *(
            _tritium(f"fill-{words.split()[0]}", 170, f"bench tune {words} --rounds 1")
            for words in (attention, mlp, loss)
        ),
    ]
    return [
        first[0],
        *(replace(part, together=True) for part in first[1:]),
        _tritium(
            "machine", 215, "bench machine gpt2 --micro-batch-size 32 --out FOLDER/machine.json"
        ),
        _tritium("train-32", 300, f"{models} --steps 60 --out FOLDER/train-32.json"),
        _tritium(
            "profile",
            335,
            "bench predict gpt2 --batch-size 32 --micro-batch-size 32 --measure 5 "
            "--out FOLDER/profile.json",
        ),
        *(
            _tritium(
                f"tune-{words.split()[0]}",
                until,
                f"bench tune {words} --out FOLDER/tune-{until}.json",
            )
            for until, words in ((370, attention), (390, mlp), (405, loss))
        ),
        _tritium(
            "kernels",
            SHORT_SECONDS,
            "bench kernels causal_attention --shape 64x1024x12x64 "
            "--without torch.compile --out FOLDER/kernels",
        ),
    ]


COMMANDS: dict[str, Callable[[bool], list[Part]]] = {
    "short": short,
    "correct": correct,
    "train": train,
    "kernels": kernels,
    "tune": tune,
    "later": later,
}


# --- running a command


def run_part(part: Part, folder: Path, seconds: float, save: Callable[[], None]) -> dict[str, Any]:
    """Run a part for at most `seconds`. Return how it ended: done, failed, stopped or skipped.

    Args:
        save: called while the part runs.
    """
    if seconds < 1:
        return {"name": part.name, "status": "skipped", "seconds": 0.0, "last_line": ""}
    words = (
        word.replace("FOLDER", str(folder)).replace("PYTHON", sys.executable) for word in part.words
    )
    command = [part.program or sys.executable, *words]
    log = folder / f"{part.name}.log"
    began = time.monotonic()
    try:
        code = _wait(command, log, seconds, save)
    except FileNotFoundError:
        code = 127
        log.write_text(f"{command[0]} is not installed\n")
    lines = log.read_text(errors="replace").strip().splitlines()
    status = {None: "stopped", 0: "done"}.get(code, "failed")
    return {
        "name": part.name,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "last_line": lines[-1] if lines else "",
        "failed_tests": re.findall(r"^(?:FAILED|ERROR) (\S+)", "\n".join(lines), re.MULTILINE),
    }


def _wait(command: list[str], log: Path, seconds: float, save: Callable[[], None]) -> int | None:
    """Run a program with its output in `log`. Return its exit status, or None if it was stopped."""
    end = time.monotonic() + seconds
    with log.open("w") as output:
        # A session of its own, so that the workers of pytest are stopped with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
        try:
            while (left := end - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, SAVE_SECONDS))
                save()
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_command(name: str, out: Path, *, rehearse: bool, spent: float = 0.0) -> int:
    """Run a command of device.sh. Returns: exit status, 1 if a part did not end well.

    Args:
        out: where the two files are written.
        rehearse: whether to run tiny sizes on the CPU.
        spent: seconds that were spent before, on the installation.
    """
    began = time.monotonic() - spent
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    ends: list[dict[str, Any]] = []

    lock = threading.Lock()

    def save() -> None:
        with lock:
            save_files(name, out, list(ends), rehearse=rehearse)

    def run(part: Part) -> None:
        end = run_part(part, folder, began + part.until - time.monotonic(), save)
        ends.append(end)
        save()
        log = folder / f"{part.name}.log"
        if log.exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            print("\n".join(lines[-LOG_LINES:]))
        print(f"--- {part.name}: {end['status']} after {end['seconds']:.0f} s", flush=True)

    groups: list[list[Part]] = []
    for part in COMMANDS[name](rehearse):
        if part.together:
            groups[-1].append(part)
        else:
            groups.append([part])
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            list(pool.map(run, group))
    print(f"{name}: {time.monotonic() - began:.0f} s in total; results in {out / name}.json")
    return int(any(end["status"] != "done" for end in ends))


def save_files(name: str, out: Path, ends: list[dict[str, Any]], *, rehearse: bool) -> None:
    """Write OUT/NAME.json and OUT/NAME.tar.gz from the files that the parts wrote so far."""
    folder = out / name
    records = {}
    for path in sorted(folder.rglob("*.json")):
        with contextlib.suppress(ValueError):  # a file that is being written
            record = json.loads(path.read_text())
            if isinstance(record, dict) and "kind" in record:
                records[str(path.relative_to(folder))] = record
    figures = {"command": name, "is_rehearsal": rehearse, "parts": ends, "records": records}
    write_record(out / f"{name}.json", "device", figures)
    archive = out / f"{name}.tar.gz"
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".log", ".png", ".txt", ".jsonl", ".json"):
                tar.add(path, arcname=str(path.relative_to(out)))
    partial.replace(archive)


def main(argv: Sequence[str]) -> int:
    """Run a command of device.sh, with the words that the script passes."""
    parser = argparse.ArgumentParser(prog="bench/device.sh")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--spent", type=float, default=0.0)
    options = parser.parse_args(argv)
    # A killed command must stop its part, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run_command(
        options.command, options.out.resolve(), rehearse=options.rehearse, spent=options.spent
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

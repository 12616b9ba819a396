import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tritium
from tritium.train import api, session
from tritium.train.run.checkpoint import checkpoints

pytestmark = pytest.mark.plain


@pytest.fixture
def options(tiny, corpus, tmp_path) -> dict:
    """Options of a run that takes about a second."""
    return {
        **{"data": corpus, "tokenizer": "bytes", "out": tmp_path / "run", "device": "cpu"},
        **{"n_layer": 1, "n_head": 2, "d_model": 16, "context_tokens": 64, "steps": 6},
        **{"batch_size": 4, "eval_interval": 3, "eval_tokens": 64, "sample_tokens": 3},
        "warmup_steps": 2,
    }


def weights(run, step=6) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "model.safetensors").read_bytes()


def test_a_run_from_python_is_that_of_the_command_line(options, tiny, tritium, tmp_path):
    run = api.train("laptop", **options)
    assert run.folder == tmp_path / "run"
    lines = run.metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(6))
    assert [line["val_loss"] for line in lines if "val_loss" in line][-1] == run.evaluation.loss
    words = [
        word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    assert tritium("train", "laptop", *words, "--out", tmp_path / "other")[0] == 0
    assert weights(run.folder) == weights(tmp_path / "other")


def test_a_run_samples_plots_and_is_fine_tuned(options, tmp_path):
    run = tritium.train("laptop", **options)
    text = run.sample("the qu", max_new_tokens=4, seed=1)
    assert text.startswith("the qu")
    assert text == run.sample("the qu", max_new_tokens=4, seed=1)
    with pytest.raises(tritium.InputError, match="top_p"):
        run.sample("the qu", top_p=2.0)
    assert not run.model.training
    assert run.plot().read_bytes().startswith(b"\x89PNG")
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"instruction": "a", "output": f"b{i}"} for i in range(10)]))
    steps, evaluations = [], []
    callbacks = {"on_step": steps.append, "on_evaluation": evaluations.append}
    tuned = tritium.finetune(
        "instruct", run, records, epochs=1, out=tmp_path / "tuned", **callbacks
    )
    assert steps == [line for line in tuned.metrics() if "loss" in line]
    assert evaluations == [line for line in tuned.metrics() if "val_loss" in line]
    assert tuned.evaluation.bits_per_byte is None
    assert (tuned.folder / "answers.jsonl").exists()
    opened = tritium.load(tmp_path / "tuned")
    assert opened.tokenizer.sha256 == run.tokenizer.sha256
    assert opened.evaluation is None
    assert opened.metrics() == tuned.metrics()


def test_runs_without_out_get_the_next_free_folder(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    del options["out"]
    run = api.train("laptop", **options | {"steps": 1})
    assert run.folder == tmp_path / "runs" / "laptop-1"
    with pytest.raises(tritium.InputError, match="`data`: expected files"):
        api.train("laptop", **options | {"data": [], "steps": 1})
    with pytest.raises(tritium.InputError):
        api.train("laptop", **options | {"data": tmp_path / "none"})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["laptop-1"]


@pytest.fixture
def ctrl_c():
    """Python's handler. A program that a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_writes_a_checkpoint_and_the_run_can_be_resumed(
    options, tmp_path, monkeypatch, ctrl_c
):
    unbroken = api.train("laptop", **options | {"out": tmp_path / "unbroken"})
    original = session.learning_rate

    def interrupted(config, step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(config, step)

    with monkeypatch.context() as patch:
        patch.setattr(session, "learning_rate", interrupted)
        with pytest.raises(tritium.InterruptedRun, match=r"continue with tritium.load\(.*\).res"):
            api.train("laptop", **options)
    assert (tmp_path / "run" / "checkpoints" / "step-4").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = tritium.load(tmp_path / "run").resume()
    assert weights(run.folder) == weights(unbroken.folder)
    assert run.evaluation.loss == unbroken.evaluation.loss


def test_callbacks_get_the_lines_of_metrics(options, tmp_path):
    steps, evaluations = [], []
    run = api.train("laptop", **options, on_step=steps.append, on_evaluation=evaluations.append)
    lines = run.metrics()
    assert steps == [line for line in lines if "loss" in line]
    assert evaluations == [line for line in lines if "val_loss" in line]
    again = []
    run.resume(steps=8, on_step=again.append)
    assert [line["step"] for line in again] == [6, 7]


def test_numbers_of_numpy_are_options(options):
    run = api.train("laptop", **options | {"steps": np.int64(2), "lr": np.float32(0.5)})
    assert run.metrics()[-1]["step"] == 2
    assert '"lr": 0.5' in (run.folder / "config.json").read_text()


def test_a_callback_may_change_the_working_directory(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    run = api.train("laptop", **options | {"out": "run"}, on_step=lambda line: os.chdir(other))
    assert checkpoints(tmp_path / "run")
    assert len([line for line in run.metrics() if "loss" in line]) == 6
    monkeypatch.chdir(tmp_path)
    opened = tritium.load("run")
    monkeypatch.chdir(other)
    assert opened.metrics() == run.metrics()


def test_the_time_of_a_run_begins_with_the_call(options, tmp_path, monkeypatch):
    """The process itself may have started hours before, as that of a notebook."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        began = time.perf_counter()
        run = api.train("laptop", **options | {"out": None})
        elapsed = time.perf_counter() - began
        wall_seconds = [line["wall_seconds"] for line in run.metrics() if "goodput" in line]
        assert 0 < wall_seconds[-1] <= elapsed


def test_a_run_that_stopped_before_its_first_checkpoint_is_not_to_be_resumed(options, monkeypatch):
    def stop(*arguments, **more):
        raise tritium.InterruptedRun(signal.SIGALRM)

    monkeypatch.setattr(api, "start", stop)
    with pytest.raises(tritium.InterruptedRun) as stopped:
        api.train("laptop", **options)
    assert str(stopped.value) == f"the run was stopped by signal {signal.SIGALRM:d}"


def test_a_time_limit_outside_of_the_main_thread_raises(options):
    """Signals do not reach other threads, so the limit would have no effect."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(tritium.InputError, match="max_minutes: exp"):
        pool.submit(api.train, "laptop", **options, max_minutes=5.0).result()


class EnoughError(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "at", "error"),
    [
        ("on_step", 3, EnoughError),
        ("on_step", 3, KeyboardInterrupt),
        ("on_evaluation", 6, EnoughError),
    ],
)
def test_an_exception_in_a_callback_stops_the_run_with_a_checkpoint(
    name, at, error, options, tmp_path
):
    calls = []

    def stop(line):
        calls.append(line["step"])
        if line["step"] >= at - (name == "on_step"):
            raise error(at)

    with pytest.raises(error) as found:
        api.train("laptop", **options, **{name: stop})
    assert found.value.args == (at,)
    assert calls[-1] == at - (name == "on_step")  # no call after the exception
    assert max(checkpoints(tmp_path / "run")) >= at
    run = tritium.load(tmp_path / "run").resume()
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(6))


def test_bad_input_raises_what_the_command_line_prints(options, tmp_path):
    with pytest.raises(tritium.InputError, match="unknown recipe 'labtop'; did you mean 'laptop'"):
        api.train("labtop")
    with pytest.raises(tritium.InputError, match="unknown option 'step'; did you mean 'steps'"):
        api.train("laptop", step=1)
    with pytest.raises(tritium.InputError, match="steps: expected int, got '5'"):
        api.train("laptop", steps="5")
    with pytest.raises(tritium.InputError, match="lora_targets: expected"):
        api.train("laptop", lora_targets="c_attn")
    with pytest.raises(tritium.InputError, match="on_step: expected a function, got 5"):
        api.train("laptop", on_step=5)
    with pytest.raises(tritium.InputError, match="none: expected a run"):
        tritium.load(tmp_path / "none")
    with pytest.raises(tritium.InputError, match="unknown task 'instrct'"):
        tritium.finetune("instrct", tmp_path, "f")
    with pytest.raises(tritium.InputError, match="micro_batch_size: expected a divisor of"):
        api.train("laptop", batch_size=8, micro_batch_size=3)
    file = tmp_path / "my.toml"
    for text, message in (
        ('recipe = "laptop"\nstepz = 1\n', ":2: unknown option 'stepz'; did you mean 'steps'"),
        ("steps = \n", r"expected TOML, got a syntax error: .*line 1"),
    ):
        file.write_text(text)
        with pytest.raises(tritium.InputError, match=message):
            api.train(file)
    run = api.train("laptop", **options)
    metrics = run.folder / "metrics.jsonl"
    metrics.write_text('{"iter": 1, "train_loss": 2.0}\n')  # as another version writes it
    for read in (run.metrics, run.plot):
        with pytest.raises(tritium.InputError, match="expected lines with step, loss, lr and"):
            read()
    metrics.unlink()
    with pytest.raises(tritium.InputError, match=r"run: expected metrics\.jsonl, found none"):
        run.metrics()
    run.model.save_pretrained(tmp_path / "exported")
    with pytest.raises(tritium.InputError, match="expected the folder of a run, got a published"):
        tritium.load(tmp_path / "exported").metrics()


def test_the_public_names_are_listed_and_import_nothing():
    code = (
        "import sys, tritium; assert set(tritium.__all__) <= set(dir(tritium)); "
        "assert not {'torch', 'numpy'} & set(sys.modules); "
        "assert callable(tritium.train); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tritium.Run is api.Run
    with pytest.raises(AttributeError, match="module 'tritium' has no attribute 'trian'"):
        _ = tritium.trian

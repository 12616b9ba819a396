"""`tritium train`: bad input is one line on stderr and status 2, and nothing is overwritten."""

import json
import re

import pytest
import torch

from tritium.model.cost import step_bytes
from tritium.train import plan as planner
from tritium.train.data.build import build
from tritium.train.machine.memory import RESERVE
from tritium.train.plan import Machine
from tritium.train.run.folder import read_run
from tritium.train.trainer import Trainer

pytestmark = pytest.mark.plain


def test_help_lists_recipes_and_options(tritium):
    status, out, _ = tritium("train", "--help")
    assert status == 0
    assert "usage: tritium train" in out
    assert "laptop, shakespeare-char, gpt2" in out
    assert "--n-layer INT" in out


def test_unknown_recipe_and_option_suggest_near_names(error_of):
    assert "unknown recipe 'gpt-2'; did you mean 'gpt2'" in error_of("train", "gpt-2")
    assert "did you mean --lr" in error_of("train", "laptop", "--lrr", "1")
    # Names of other trainers.
    assert "did you mean --steps?" in error_of("train", "laptop", "--max-iters", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["--schedule", "linear"], "invalid choice 'linear'"),
        (["--steps", "0"], "--steps: expected 1 or more, and finite, got 0"),
        (["--n-head", "3"], "--d-model: expected a multiple of --n-head, 3, got 16"),
        (["--device", "tpu"], "--device: expected a device"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", ""], "--data: expected files, folders, a dataset, stdlib or python, got none"),
        (["--context-tokens", "1000000"], "context_tokens 1000000 needs 1000001 training tokens"),
        (["--tokenizer", "bpe:10"], "bpe:10"),
        (["--tokenizer", "words"], "words"),
        (["--precision", "float8"], "invalid choice 'float8'"),
        (["--optimizer", "sgd"], "invalid choice 'sgd'"),
        (["--resume", "x"], "--resume RUN_DIR comes first"),
        (["--held-out", "0"], "--held-out: expected a number between 0 and 1, got 0"),
        (["--tokens", "10B", "--steps", "5"], "--tokens: expected --tokens or --steps, got both"),
    ],
)
def test_bad_option_is_one_line_and_makes_no_run(words, message, error_of, tiny, tmp_path):
    assert message in error_of(*tiny, *words)
    assert not (tmp_path / "run").exists()


def test_a_small_batch_takes_a_micro_batch_that_divides_it(tiny, tritium, tmp_path):
    assert tritium("train", "gpt2", *tiny[2:], "--batch-size", 6, "--steps", 1)[0] == 0
    assert read_run(tmp_path / "run").train.micro_batch == 2  # 32 in the recipe


def test_options_end_only_at_the_end_of_a_word(tiny, tritium):
    text = ("--prompt", "see --config", "--print-config")
    status, out, err = tritium(*tiny, *text)
    assert status == 0, err
    assert 'prompt = "see --config"' in out
    status, _, err = tritium("train", "--print-config", "--prompt", "see --resume", "auto")
    assert status == 2
    assert "auto" in err


def test_tokens_set_the_steps(tiny, tritium, error_of, tmp_path):
    i = tiny.index("--steps")
    words = tiny[:i] + tiny[i + 2 :]
    assert "--tokens: expected a number of tokens such as 10B" in error_of(*words, "--tokens", "x")
    status, _, err = tritium(*words, "--tokens", "0.1k", "--batch-size", 3, "--log-interval", 2)
    assert status == 0, err
    assert read_run(tmp_path / "run").train.steps == 3  # 48 tokens per step
    assert "step 2: loss " in err


@pytest.mark.slow
def test_missing_compiler_is_one_line(error_of, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):
        assert "expected a working C++ compiler, found none; install g++" in error_of(
            *tiny, "--compile", "on"
        )


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (0, "does not fit, .* nor does a single sequence"),
        (2, "does not fit, .*; --micro-batch-size 2 does [(]at most 2 at once[)]"),
        (
            4,
            "fits, .*; at most 4 sequences at once .*; free other memory of the device, "
            "or resume with a smaller --micro.*",
        ),
    ],
)
def test_out_of_memory_names_the_micro_batch_that_fits(
    sequences, message, error_of, tiny, tmp_path, monkeypatch
):
    """With a machine that, by the plan, has memory for `sequences` sequences."""

    def machine(processes):
        need = sum(
            step_bytes(
                read_run(tmp_path / "run").model, sequences, 16, 4, accumulates=sequences < 4
            ).values()
        )
        return Machine(
            name="this CPU",
            gpus=1,
            memory_bytes=int(need / (1 - RESERVE)) + 1,
            itemsize=4,
            ceiling=None,
        )

    def full(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(planner, "_cpu_machine", machine)
    monkeypatch.setattr("tritium.train.machine.memory.PROCESS_BYTES", 0)
    monkeypatch.setattr(Trainer, "backward", full)
    answer = error_of(*tiny)
    assert re.fullmatch(
        "tritium: out of memory: by the formulas of `tritium plan` a step " + message + ".*", answer
    ), answer
    assert re.search(message, error_of("train", "--resume", tmp_path / "run"))


def test_corpus_without_text_is_one_line_and_makes_no_run(error_of, tritium, tiny, tmp_path):
    empty, binary, folder = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "folder"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00\x01" * 10)
    folder.mkdir()
    (folder / "picture.png").write_bytes(b"\x89PNG")
    for path in (empty, binary, folder):
        assert str(path) in error_of(*tiny, "--data", path)
    assert not (tmp_path / "run").exists()
    assert "training into" not in tritium(*tiny, "--data", empty)[1]


def test_the_folder_of_the_run_is_announced_when_it_is_claimed(tritium, tiny, tmp_path):
    _, out, _ = tritium(*tiny)
    run = tmp_path / "run"
    assert out.startswith(f"laptop: training into {run}; watch {run / 'metrics.jsonl'}\n")


@pytest.mark.parametrize(
    ("sample", "option"),
    [
        ("# --- 12\nimport os\nimport re\n", " --prompt 'import os'"),
        ("ROMEO:\nGood morrow, cousin", " --prompt 'Good morrow'"),
        ("hello world is big", " --prompt 'world is'"),
        ("-------- ------", ""),
        ("", ""),
    ],
)
def test_the_next_command_has_a_prompt_from_the_sample(sample, option, tritium, tiny, monkeypatch):
    monkeypatch.setattr("tritium.train.commands.training._running.last_sample", lambda run: sample)
    _, out, _ = tritium(*tiny, "--steps", 1)
    assert re.search(rf"^next: .* sample \S+/run{option}$", out, re.MULTILINE), out


def test_the_next_command_has_the_prompt_of_the_run(tritium, tiny):
    assert "/run --prompt 'It is'\n" in tritium(*tiny, "--steps", 1, "--prompt", "It is")[1]


def test_the_advised_run_is_longer_than_the_warmup(tritium, tiny):
    out = tritium(*tiny, "--steps", 1, "--warmup-steps", 50)[1]
    assert "for a better model, a new run with --steps 200\n" in out


def test_existing_run_or_folder_is_not_overwritten(error_of, tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "is a run already; choose another --out, or --resume it" in error_of(*tiny)
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    assert "this one holds other files" in error_of(*tiny, "--out", tmp_path / "used")


def test_options_of_a_build_raise_with_a_built_dataset(error_of, tiny, corpus, tmp_path):
    build(tmp_path / "dataset", [corpus], "bytes", progress=False)
    words = [*tiny, "--data", tmp_path / "dataset"]
    for option in ("--held-out", "--text-field"):
        line = error_of(*words, option, "0.2")
        assert f"{option}: expected none with {tmp_path / 'dataset'}, a dataset that is" in line


def test_text_field_names_the_column_of_the_text(tritium, tiny, corpus, tmp_path):
    rows = [f"ham\t{line}\n" for line in corpus.read_text().splitlines()]
    (tmp_path / "a.tsv").write_text("".join(rows))
    status, _, err = tritium(*tiny, "--data", tmp_path / "a.tsv", "--text-field", "2")
    assert status == 0, err
    assert read_run(tmp_path / "run").train.text_field == "2"


def test_bad_resume_is_one_line(error_of, tritium, tiny, tmp_path):
    assert "expected the folder of a run" in error_of("train", "--resume", tmp_path)
    assert "expected the folder of a run, or auto, got none" in error_of("train", "--resume")
    assert tritium("train", "--resume", "RUN_DIR", "--help")[0] == 0
    line = error_of("train", "--resume", tmp_path, "--print-config")
    assert "--print-config: expected a new run, got --resume RUN_DIR" in line
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "run"
    record = json.loads((run / "config.json").read_text())
    changed = record | {"tokenizer_sha256": "0" * 64}
    (run / "config.json").write_text(json.dumps(changed))
    assert "config.json: it does not match its checksum" in error_of("train", "--resume", run)
    del changed["sha256"]  # as an older version wrote it
    (run / "config.json").write_text(json.dumps(changed))
    assert "expected tokenizer 000000000000, with which" in error_of("train", "--resume", run)
    (run / "config.json").write_text(json.dumps(record))
    for step in (0, 10, 20):
        file = run / "checkpoints" / f"step-{step}" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    answer = error_of("train", "--resume", run)
    assert re.search(
        "step-20/model.safetensors: damaged: .*; older checkpoints that are damaged too: 2", answer
    )

"""What the commands say, above all to bad input: one line, status 2, nothing overwritten."""

import gzip
import json
import re

import pytest
import torch

from tritium.model.cost import step_bytes
from tritium.train import plan as planner
from tritium.train.plan import RESERVE, Machine
from tritium.train.run.folder import read_run
from tritium.train.trainer import Trainer

pytestmark = pytest.mark.plain


def test_help_reads_like_a_manual_page(tritium):
    status, out, _ = tritium("--help")
    assert status == 0
    assert all(f"tritium {name}" in out for name in ("train", "data", "sample", "info"))
    assert tritium() == tritium("--help")
    for words in (["train", "--help"], ["data", "build", "--help"], ["sample", "--help"]):
        status, out, err = tritium(*words)
        assert status == 0, err
        assert "usage: tritium " + words[0] in out
    assert "laptop, shakespeare-char, gpt2" in tritium("train", "--help")[1]


def test_info(tritium, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "elsewhere"))
    status, out, _ = tritium("info")
    assert status == 0
    for name in (
        "tritium",
        "torch",
        "triton",
        "device",
        "ceilings",
        "default recipe",
        "compile cache",
        str(tmp_path / "elsewhere"),
    ):
        assert name in out


def test_build_train_sample(tritium, tiny, corpus, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for i in range(150):
        (more / f"{i}.md").write_text(f"# Title {i}\n\nSome words about number {i}.\n")
    (more / "copy.md").write_text((more / "0.md").read_text())
    (more / "picture.txt").write_bytes(b"\0\1\2")
    with gzip.open(more / "lines.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "a line of json"}) + "\n")
    dataset = tmp_path / "dataset"
    status, out, err = tritium("data", "build", dataset, more, corpus, "--tokenizer", "bpe:300")
    assert status == 0, err
    assert "dropped 1 duplicate documents, skipped 1 files" in out

    at = tiny.index("--data")
    words = tiny[:at] + tiny[at + 4 :]  # without --data and --tokenizer
    status, _, err = tritium(*words, "--data", dataset)
    assert status == 0, err
    options = ("--max-new-tokens", 8, "--seed", 3)
    status, out, err = tritium("sample", tmp_path / "run", "--prompt", "# Title", *options)
    assert status == 0, err
    assert out.startswith("# Title")
    assert tritium("sample", tmp_path / "run", "--prompt", "# Title", *options)[1] == out


def test_unknown_words_are_answered_with_the_near_ones(refused):
    assert "no command 'trian'; near: train" in refused("trian")
    assert "unknown recipe 'gpt-2'; did you mean 'gpt2'" in refused("train", "gpt-2")
    assert "near: --lr" in refused("train", "laptop", "--lrr", "1")
    assert "expected build, got 'biuld'" in refused("data", "biuld")
    assert "takes no options" in refused("info", "--all")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "fast"], "could not convert string to float: 'fast'"),
        (["--schedule", "linear"], "invalid choice 'linear'"),
        (["--steps", "0"], "--steps: expected 1 or more, and finite, got 0"),
        (["--n-head", "3"], "d_model must be a multiple of n_head (3), got 16"),
        (["--device", "tpu"], "--device: expected a device"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--context-tokens", "1000000"], "context_tokens 1000000 needs 1000001 training tokens"),
        (["--tokenizer", "bpe:10"], "bpe:10"),
        (["--tokenizer", "words"], "words"),
        (["--precision", "float8"], "invalid choice 'float8'"),
        (["--optimizer", "sgd"], "invalid choice 'sgd'"),
        (["--resume", "x"], "--resume RUN_DIR comes first"),
    ],
)
def test_bad_options_of_train(words, message, refused, tiny, tmp_path):
    assert message in refused(*tiny, *words)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_pytorch_lacks_is_found_out_before_there_is_a_run(
    refused, tiny, tmp_path, monkeypatch
):
    monkeypatch.delattr(torch.optim, "Muon")
    assert "--optimizer: expected a PyTorch with torch.optim.Muon" in refused(
        *tiny, "--optimizer", "muon"
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_compiler_is_one_line(refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):
        assert "expected a working C++ compiler, found none; install g++" in refused(
            *tiny, "--compile", "on"
        )


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (0, "does not fit, .* nor does a single sequence"),
        (2, "does not fit, .*; --micro-batch-size 2 does [(]at most 2 at once[)]"),
        (
            4,
            "fits, .*; at most 4 sequences at once .*; free what else is in it, or start anew with a smaller --micro.*",
        ),
    ],
)
def test_out_of_memory_names_what_the_plan_thinks_fits(
    sequences, message, refused, tiny, tmp_path, monkeypatch
):
    """On a machine that holds so many sequences, by the plan."""

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

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(planner, "_cpu_machine", machine)
    monkeypatch.setattr(planner, "PROCESS_BYTES", 0)
    monkeypatch.setattr(Trainer, "backward", full)
    answer = refused(*tiny)
    assert re.fullmatch(
        "tritium: out of memory: by the formulas of `tritium plan` a step " + message + ".*", answer
    ), answer
    assert re.search(message, refused("train", "--resume", tmp_path / "run"))


def test_bad_corpora(refused, tiny, tmp_path):
    empty, binary, folder = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "folder"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00\x01" * 10)
    folder.mkdir()
    (folder / "picture.png").write_bytes(b"\x89PNG")
    for path in (empty, binary, folder):
        assert str(path) in refused(*tiny, "--data", path)
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(refused, tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "this one is a run already" in refused(*tiny)
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    assert "this one is in use" in refused(*tiny, "--out", tmp_path / "used")


def test_bad_resumes(refused, tritium, tiny, tmp_path):
    assert "expected the folder of a run" in refused("train", "--resume", tmp_path)
    assert "expected a folder of a run, got none" in refused("train", "--resume")
    answer = refused("train", "--resume", "a", "--steps", "3")
    assert "expected nothing after it but how processes share the run" in answer
    assert answer.endswith("see tritium train --resume RUN_DIR --help")
    assert tritium("train", "--resume", "RUN_DIR", "--help")[0] == 0
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "run"
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(record | {"tokenizer_sha256": "0" * 64}))
    assert "expected shards of tokenizer 000000000000" in refused("train", "--resume", run)
    (run / "config.json").write_text(json.dumps(record))
    file = run / "checkpoints" / "step-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors: damaged" in refused("train", "--resume", run)
    assert "model.safetensors: damaged" in refused("sample", run)
    assert "expected the folder of a run" in refused("sample", tmp_path / "nowhere")


def test_bad_sampling_options(refused, tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    assert "temperature must be 0 or more and finite" in refused(
        "sample", tmp_path / "run", "--temperature", "-1"
    )
    assert "top_p must lie in (0, 1]" in refused("sample", tmp_path / "run", "--top-p", "2")

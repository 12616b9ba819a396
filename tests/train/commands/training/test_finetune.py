import json

import pytest

from tritium.train.commands.training import _running
from tritium.train.finetune.start import finetune_tasks
from tritium.train.run.folder import read_run

pytestmark = pytest.mark.plain


@pytest.fixture
def base(tiny, tritium, tmp_path):
    words = ["--context-tokens", 256, "--steps", 1, "--out", tmp_path / "base"]
    assert tritium(*tiny, *words)[0] == 0
    return tmp_path / "base"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "records.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text("\n".join([json.dumps({"messages": turns})] * 8))
    return path


@pytest.fixture
def configs(monkeypatch):
    """The configurations of the runs that would start."""
    found = []
    monkeypatch.setattr(
        _running, "run_new", lambda name, config, launch: found.append((name, config)) or 0
    )
    return found


def test_options_reach_the_run(base, file, configs, tritium):
    words = ("--data", file, "--epochs", 2, "--dropout", 0.1, "--no-packing", "--lr", 1e-4)
    assert tritium("finetune", "instruct", base, *words)[0] == 0
    ((name, config),) = configs
    assert name == config.task == "instruct"
    assert (config.lr, config.min_lr, config.model.dropout) == (1e-4, 0.0, 0.1)
    assert config.model.context_tokens == 256
    assert not config.task_options.packing
    assert config.task_options.epochs == 2
    assert tritium("finetune", "instruct", base, "--data", file, "--steps", 5)[0] == 0
    assert configs[1][1].steps == 5
    assert configs[1][1].task_options.epochs is None


def test_help_lists_the_tasks_and_the_options_of_a_task(tritium):
    status, out, _ = tritium("finetune", "--help")
    assert status == 0
    assert all(f"\n  {task}: " in out for task in finetune_tasks())
    status, out, _ = tritium("finetune", "instruct", "--help")
    assert status == 0
    for option in ("--epochs", "--template", "--lr", "--dropout", "--device", "--out"):
        assert option in out
    for option in ("--n-layer", "--held-out", "--init-from", "--eval-interval", "--text-field"):
        assert option not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["instrct"], "unknown task 'instrct'; did you mean 'instruct'?"),
        (["instruct"], "finetune instruct: expected MODEL, a run, a checkpoint"),
        (["instruct", "BASE"], "--data: expected a file of records, got none"),
        (["instruct", "none", "--data", "FILE"], "none: expected a run, a checkpoint"),
        (["instruct", "BASE", "--data", "FILE", "FILE"], "--data: expected one file of records"),
        (["instruct", "BASE", "--data", "FILE", "--epochs", 0], "--epochs: expected more than 0"),
        (["instruct", "BASE", "--data", "FILE", "--steps", 2, "--epochs", 2], "--steps: expected"),
        (["instruct", "BASE", "--data", "FILE", "--n-layer", 2], "nrecognized"),
        (["instruct", "BASE", "--data", "FILE", "--template", "model"], "--template: expected"),
    ],
)
def test_bad_input_is_one_line(words, message, base, file, error_of, tmp_path):
    names = {"BASE": base, "FILE": file}
    words = [names.get(word, word) for word in words]
    assert message in error_of(
        "finetune", *words, *(["--out", tmp_path / "out"] * (len(words) > 1))
    )
    assert not (tmp_path / "out").exists()


def test_chat_uses_the_template_of_the_run(base, file, tritium, tmp_path, monkeypatch):
    out = tmp_path / "tuned"
    words = ("--data", file, "--steps", 1, "--template", "alpaca", "--device", "cpu", "--out", out)
    status, shown, err = tritium("finetune", "instruct", base, *words, "--test-fraction", 0)
    assert status == 0, err
    assert f"chat {out}" in shown
    assert read_run(out).train.task_options.template == "alpaca"
    prompts = []

    def answer(model, tokenizer, prompt, sampling, decoder):
        prompts.append((tokenizer.decode(prompt), sampling.stop))
        yield "yes"

    monkeypatch.setattr("tritium.train.generation.chat.stream_sample", answer)
    lines = iter(["hi"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, "/exit"))
    assert tritium("chat", out, "--max-new-tokens", 20)[1].strip() == "yes"
    assert prompts[0][0].endswith("### Instruction:\nhi\n\n### Response:\n")
    assert prompts[0][1] == ("\n\n### Instruction:",)

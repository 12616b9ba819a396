import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT
from tritium.train.distributed.world import SINGLE_PROCESS
from tritium.train.execution import resolve
from tritium.train.finetune.instruct import open_data
from tritium.train.finetune.start import finetune_config
from tritium.train.run.folder import read_run
from tritium.train.run.metrics import read_metrics
from tritium.train.run.models import open_model

pytestmark = pytest.mark.plain


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "model.safetensors").read_bytes()


@pytest.fixture
def tune(base, file, tritium, tmp_path):
    """Fine-tune the base: tune("--lr", 1e-3) -> folder of the run."""

    def call(*words, out="tuned"):
        command = ("finetune", "instruct", base, "--data", file, "--out", tmp_path / out)
        status, _, err = tritium(*command, "--device", "cpu", *words)
        assert status == 0, err
        return tmp_path / out

    return call


def test_a_run_evaluates_each_epoch_and_answers_the_test_records(tune, records, tritium):
    run = tune("--epochs", 2, "--batch-size", 2, "--answer-tokens", 5)
    record = read_run(run)
    assert record.train.task == "instruct"
    assert record.train.task_options.template == "plain"
    _, evaluations = read_metrics(run)
    interval = record.train.report.eval_interval
    assert [each["step"] for each in evaluations] == [interval, record.train.steps]
    assert evaluations[1]["val_loss"] < evaluations[0]["val_loss"]
    answers = lines(run / "answers.jsonl")
    assert len(answers) == 2
    for each in answers:
        answer = each.pop("answer")
        assert len(answer) <= 5
        assert each in records
    sample = (run / "samples.txt").read_text()
    assert "User: Say" in sample
    assert tritium("sample", run, "--seed", 1, "--max-new-tokens", 5)[0] == 0
    assert tritium("export", run, run.parent / "exported")[0] == 0
    card = (run.parent / "exported" / "README.md").read_text()
    assert "tritium finetune instruct" in card


def test_a_folder_of_transformers_is_fine_tuned_like_its_run(tune, base, file, tritium, tmp_path):
    run = tune("--steps", 1, "--test-fraction", 0)
    assert tritium("export", base, tmp_path / "exported")[0] == 0
    words = ("--data", file, "--device", "cpu", "--steps", 1, "--test-fraction", 0)
    out = tmp_path / "other"
    assert tritium("finetune", "instruct", tmp_path / "exported", *words, "--out", out)[0] == 0
    losses = [read_metrics(folder)[0][0]["loss"] for folder in (run, out)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("words", [[], ["--no-packing", "--dropout", 0.1]], ids=str)
def test_a_resumed_run_ends_bitwise_like_an_unbroken_one(words, tune, tritium):
    options = ["--steps", 6, "--batch-size", 4, "--checkpoint-interval", 3, "--answer-tokens", 3]
    run = tune(*options, *words)
    broken = run.with_name("broken")
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "step-6")
    (broken / "answers.jsonl").unlink()
    shutil.rmtree(run.with_name("base"))  # a resumed run does not need it
    assert tritium("finetune", "--resume", broken)[0] == 0
    assert weights(run, 6) == weights(broken, 6)
    assert (run / "answers.jsonl").read_bytes() == (broken / "answers.jsonl").read_bytes()
    assert read_metrics(run)[1][-1] == read_metrics(broken)[1][-1]


def test_a_resumed_run_finds_its_records_and_notices_changes(tune, file, tritium, error_of):
    run = tune("--steps", 2, "--test-fraction", 0)
    assert not (run / "answers.jsonl").exists()
    moved = run.parent / "moved"
    moved.mkdir()
    run.rename(moved / "tuned")
    file.rename(moved / file.name)
    assert tritium("train", "--resume", moved / "tuned", "--change", "steps=3")[0] == 0
    # Older versions did not record the hash.
    old = replace(read_run(moved / "tuned"), data_sha256=None)
    assert len(open_data(old.train, record=old, run=moved / "tuned").conversations) == 20
    (moved / file.name).write_text("[]")
    message = error_of("finetune", "--resume", moved / "tuned")
    assert f"{moved / file.name}: expected the records with which" in message


@pytest.mark.slow
def test_twenty_over_fitted_records_are_reproduced_verbatim(tune, file, records):
    more = {"instruction": "Say nothing", "output": "Nothing."}  # one record is for validation
    file.write_text(json.dumps([*records, more]))
    run = tune(
        *("--epochs", 80, "--lr", 1e-2, "--batch-size", 2, "--val-fraction", 0),
        *("--test-fraction", 0, "--checkpoint-interval", 100_000, "--sample-tokens", 1),
    )
    record = read_run(run)
    data = open_data(record.train, record=record, run=run)
    train = data.splits[0].tolist()
    assert len(train) == 20
    found = data.answer(open_model(run).load(), [data.question(place) for place in train], 64)
    assert found == [data.conversations[place][-1]["content"] for place in train]


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_equals_that_of_transformers_with_masked_labels(packing, base, file):
    transformers = pytest.importorskip("transformers")
    config = finetune_config("instruct", base, file, packing=packing, device="cpu")
    data = open_data(config)
    model = open_model(base).load().eval()
    model.save_pretrained(base / "published")
    other = transformers.GPT2LMHeadModel.from_pretrained(base / "published").double().eval()
    total = count = 0.0
    for place in data.splits[1].tolist():
        (example,) = data.encode(place)
        ids = torch.from_numpy(example.tokens).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(example.is_answer), -100)
        with torch.no_grad():
            mean = other(ids, labels=labels).loss.item()
        total += mean * example.is_answer.sum()
        count += example.is_answer.sum()
    execution = resolve(config)
    batches = data.evaluation_batches(config, execution, is_last=True)
    found = data.evaluate(model, batches, SINGLE_PROCESS)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity is not None
    assert found.bits_per_byte is None


def test_prompts_that_fill_the_context_have_no_answer(base, file):
    data = open_data(finetune_config("instruct", base, file, device="cpu"))
    model = GPT(open_model(base).config).eval()
    answers = data.answer(model, [[1] * 64, [1] * 62, [1] * 63], 100)
    assert answers[0] is None
    assert answers[2] is not None
    assert len(answers[1]) <= 2 * 3, "the context has room for two tokens"


def test_texts_of_answers_have_no_special_tokens(base, file):
    """decode_answer leaves them out. Tests of tokenizers check it."""
    data = open_data(finetune_config("instruct", base, file, device="cpu"))
    data.tokenizer.decode_answer = lambda ids: " an answer "
    assert data.answer(open_model(base).load().eval(), [[97] * 5], 3) == ["an answer"]


def test_a_long_prompt_does_not_shorten_the_answers_of_its_batch(base, file):
    data = open_data(finetune_config("instruct", base, file, device="cpu"))
    model = open_model(base).load().eval()
    prompts = [[97] * 62, [98] * 5, [97] * 64, [99] * 40]
    alone = [data.answer(model, [prompt], 50)[0] for prompt in prompts]
    assert data.answer(model, prompts, 50) == alone


def test_answers_that_are_too_long_are_cut_and_counted(tune, file, records, tritium, base, capsys):
    long = [
        {"instruction": "short", "output": "word " * 40},
        {"instruction": "word " * 40, "output": "never seen"},
    ]
    file.write_text(json.dumps([*records, *long * 10]))
    data = open_data(finetune_config("instruct", base, file, device="cpu"))
    assert data.counts.shortened + data.counts.left_out >= 14
    line = data.describe(finetune_config("instruct", base, file))
    assert f"; records cut at 64 tokens: {data.counts.shortened}" in line
    assert f"; left out without room for an answer: {data.counts.left_out}" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a", "output": "b"},\n{]', ":2: expected JSON, got"),
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a"}',
            ":2: expected the key 'output'",
        ),
        ("", ": expected a JSON object per line, got an empty file"),
        ('[{"instruction": "a", "output": "b"}]', "data: expected at least 2 records, got 1"),
        (json.dumps([{"instruction": "a" * 99, "output": "b"}] * 4), "expected answers that begin"),
    ],
)
def test_bad_records_are_one_line(content, message, base, file, error_of, tmp_path):
    file.write_text(content)
    command = ("finetune", "instruct", base, "--data", file, "--out", tmp_path / "out")
    assert message in error_of(*command)
    assert not (tmp_path / "out").exists()


def test_a_character_without_a_token_raises_with_its_record(tiny, file, tritium, tmp_path):
    words = ["--context-tokens", 64, "--tokenizer", "chars", "--steps", 1]
    assert tritium(*tiny, *words, "--out", tmp_path / "chars")[0] == 0
    file.write_text('{"instruction": "\u20ac", "output": "b"}\n' * 3)
    with pytest.raises(InputError, match=r"records.json:\d: tokenizer chars: expected one of"):
        open_data(finetune_config("instruct", tmp_path / "chars", file))


def test_a_test_question_without_a_token_raises_before_the_first_step(
    tiny, corpus, file, tritium, tmp_path
):
    corpus.write_text(corpus.read_text() + "User: a\nAssistant: b\n" * 9)
    words = ["--context-tokens", 64, "--tokenizer", "chars", "--steps", 1]
    assert tritium(*tiny, *words, "--out", tmp_path / "chars")[0] == 0
    records = [{"instruction": "a", "output": "b"} for _ in range(20)]
    file.write_text("".join(f"{json.dumps(each)}\n" for each in records))
    config = finetune_config(
        "instruct", tmp_path / "chars", file, test_fraction=0.2, template="plain"
    )
    place = open_data(config).splits[2][0]
    records[place]["instruction"] = "\u20ac"
    file.write_text("".join(f"{json.dumps(each)}\n" for each in records))
    with pytest.raises(InputError, match=rf"records.json:{place + 1}: tokenizer chars: expected"):
        open_data(config)


def test_missing_files_and_models_raise(base, file, tmp_path):
    config = finetune_config("instruct", base, tmp_path / "none.json")
    with pytest.raises(InputError, match=r"none.json: expected a file of records, found none"):
        open_data(config)
    with pytest.raises(InputError, match="init_from: expected a model for the task instruct"):
        open_data(config.with_options(init_from=None))
    with pytest.raises(InputError, match="data: expected one file of records, got a b"):
        open_data(config.with_options(data=("a", "b")))


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_end_like_one_to_rounding(parallel, tune, launch):
    options = ["--steps", 4, "--batch-size", 4, "--checkpoint-interval", 2, "--answer-tokens", 3]
    run = tune(*options, "--lr", 1e-3)
    broken = run.with_name("broken")
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "step-4")
    status, _, errors = launch(2, "--resume", broken, "--parallel", parallel)
    assert status == [0, 0], errors
    losses = [read_metrics(folder)[1][-1]["val_loss"] for folder in (run, broken)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    steps = [[row["loss"] for row in read_metrics(folder)[0]] for folder in (run, broken)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    assert len(lines(broken / "answers.jsonl")) == 2

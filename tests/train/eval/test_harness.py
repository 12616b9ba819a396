"""The adapter for lm-evaluation-harness is compared with lm_eval's own model for transformers."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from tests.train.data.tokenizers.test_published import byte_fallback
from tritium.model import GPT, GPTConfig
from tritium.train.data.tokenizers.for_transformers import save_for_transformers
from tritium.train.data.tokenizers.tokenizer import EXPORTED_TOKENIZER, from_spec

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.plain

LINES = [
    {"question": "What is seven?", "options": ["a number", "a word"], "answer": 0},
    {"question": "Who jumps?", "options": ["the lazy dog", "the fox", "all"], "answer": 1},
    {"question": "Why?", "options": ["because", "no"], "answer": 1},
]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "num_fewshot": 1,
        "fewshot_split": "train",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{options|join(' or ')}} " * 3,
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "tiny_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def made_model(vocab_size: int, seed: int = 0) -> GPT:
    """Return a model whose predictions depend on the context."""
    torch.manual_seed(seed)
    config = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=vocab_size, context_tokens=48)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def exported(tmp_path):
    """A Hugging Face folder with tritium's own tokenizer."""
    tokenizer = from_spec("bytes", list)
    model = made_model(tokenizer.vocab_size)
    model.save_pretrained(tmp_path / "model", end_of_text=tokenizer.end_of_text)
    save_for_transformers(tokenizer, tmp_path / "model", 48)
    tokenizer.save(tmp_path / "model" / EXPORTED_TOKENIZER)
    return tmp_path / "model"


@pytest.fixture
def like_llama(tmp_path):
    """A Hugging Face folder with a tokenizer like Llama's. The model writes <s> and ▁a."""
    model = made_model(266, seed=1)
    others = [token for token in range(266) if token not in (1, 263)]
    with torch.no_grad():
        model.ln_f.bias.zero_()
        model.wte.weight[others] *= 0.1
    model.save_pretrained(tmp_path / "model", end_of_text=2)
    byte_fallback(tmp_path / "model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = names | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "model"


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    for name, task in TASKS.items():
        files = {"train": str(data), "test": str(data)}
        content = task | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder


def answers(model, folder) -> dict[str, list]:
    """All responses of a model, by task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    return {name: [each["resps"] for each in found["samples"][name]] for name in TASKS}


@pytest.mark.slow
def test_answers_equal_those_of_lm_evals_model_for_transformers(exported, task_folder, monkeypatch):
    """Without a network. lm_eval and its dependencies take about 20 s to import."""
    pytest.importorskip("accelerate")  # lm_eval's model for transformers needs it
    from lm_eval.models.huggingface import HFLM

    from tritium.train.eval.harness import TritiumLM

    def connect(*arguments):
        raise AssertionError(f"expected no connection, got one to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    theirs = answers(HFLM(str(exported), device="cpu", batch_size=2), task_folder)
    ours = answers(TritiumLM(str(exported), device="cpu", batch_size=2), task_folder)

    def numbers(found: list) -> list[float]:
        return [float(response[0][0]) for responses in found for response in responses]

    assert len(numbers(ours["tiny_choice"])) == 7
    assert numbers(ours["tiny_choice"]) == pytest.approx(numbers(theirs["tiny_choice"]), abs=1e-4)
    greedy = [[r[0][1] for r in responses] for responses in ours["tiny_choice"]]
    assert greedy == [[r[0][1] for r in responses] for responses in theirs["tiny_choice"]]
    rolling = [[r[0] for r in responses] for responses in ours["tiny_rolling"]]
    assert rolling == [
        pytest.approx([r[0] for r in responses], abs=1e-4) for responses in theirs["tiny_rolling"]
    ]
    assert ours["tiny_generate"] == theirs["tiny_generate"]


@pytest.mark.slow
def test_generated_texts_have_no_special_tokens_and_no_first_space(like_llama):
    """As those of lm_eval's model for transformers."""
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tritium.train.eval.harness import TritiumLM

    requests = [
        Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 12}), 0)
        for text in ("ab", "a b c", "Why?")
    ]
    ours = TritiumLM(str(like_llama), device="cpu", batch_size=2)
    found = ours.generate_until(requests)
    assert found == HFLM(str(like_llama), device="cpu", batch_size=2).generate_until(requests)
    assert all(text.startswith("a a") for text in found)
    assert ours.tokenizer.decode([1, 263, 1, 263]) == "<s> a<s> a"


@pytest.mark.slow
def test_generated_texts_end_at_the_stop_tokens_of_the_tokenizer(exported):
    from lm_eval.api.instance import Instance

    from tritium.train.eval.harness import TritiumLM

    ours = TritiumLM(str(exported), device="cpu")
    ours.tokenizer.stop_tokens = tuple(range(257))
    request = Instance("generate_until", {}, ("Why?", {"until": ["\n"], "max_gen_toks": 12}), 0)
    assert ours.generate_until([request]) == [""]


@pytest.mark.slow
def test_max_length_raises_and_names_max_gen_toks(error_of, exported, task_folder):
    words = ("--tasks", "tiny_generate", "--include_path", task_folder, "--device", "cpu")
    error = error_of("eval", "lm-eval", exported, *words, "--gen_kwargs", "max_length=20")
    assert "expected max_gen_toks, the largest number of new tokens, got max_length=20" in error


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["exported", "like_llama"])
def test_the_format_hellaswag_lm_eval_has_the_numbers_of_lm_evals_task(
    folder, request, tmp_path, monkeypatch
):
    """With spaces at the end of contexts, and endings that begin with a space."""
    import lm_eval
    from lm_eval.tasks.hellaswag.utils import process_docs

    from tritium.train.eval.choice import encode_examples, measure_choices
    from tritium.train.eval.choice_formats import read_examples
    from tritium.train.eval.harness import TritiumLM
    from tritium.train.eval.scoring import score

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [
        {"ctx_a": "ab [step]", "ctx_b": "[substeps]", "endings": ["[x] a", "b cab", "c"]},
        {"ctx_a": "ab a", "ctx_b": "cab", "endings": ["ab", "[x] c", " ab ab"]},
    ]
    lines = [
        {"activity_label": "A", "ctx": "unused", "label": str(label), **text}
        for text in texts
        for label in range(3)
    ]
    file = tmp_path / "hellaswag.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "tiny_hellaswag",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "process_docs": process_docs,
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = TritiumLM(str(request.getfixturevalue(folder)), device="cpu")
    theirs = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)

    name, examples = read_examples(file, "hellaswag-lm-eval")
    encoded = encode_examples(examples, model.tokenizer, model.max_length)
    pairs = [(context, choice) for context, choices in encoded for choice in choices]
    samples = theirs["samples"]["tiny_hellaswag"]
    expected = [float(number) for each in samples for ((number, _),) in each["resps"]]
    found = [each.log_likelihood for each in score(model._model.gpt, pairs, batch_size=1)]
    assert found == pytest.approx(expected, abs=1e-4)
    metrics = measure_choices(model._model.gpt, name, examples, encoded, batch_size=1)
    results = theirs["results"]["tiny_hellaswag"]
    assert metrics["accuracy_sum"] == results["acc,none"]
    for example, each in zip(examples, samples, strict=True):
        assert [len(choice.removeprefix(" ")) for choice in example.choices] == [
            len(choice) for choice in each["doc"]["choices"]
        ]
    assert metrics["accuracy_per_character"] == results["acc_norm,none"]


@pytest.mark.slow
def test_lm_eval_finds_the_model_by_its_entry_point():
    """As lm_eval after 0.4.13 does: the registry holds the name of the class until it is needed."""
    code = """if True:
        from importlib.metadata import entry_points
        from lm_eval.api.registry import get_model, model_registry
        (point,) = entry_points(group="lm_eval.models", name="tritium")
        model_registry.register(point.name, target=point.value)
        print(get_model("tritium"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "<class 'tritium.train.eval.harness.TritiumLM'>\n", done.stderr


@pytest.mark.slow
def test_the_command_runs_tasks_on_any_machine(tritium, exported, task_folder):
    """lm_eval passes the device cuda:0 unless an option names another."""
    words = ("--tasks", "tiny_choice", "--include_path", task_folder, "--batch_size", 2)
    status, out, err = tritium("eval", "lm-eval", exported, *words)
    assert status == 0, err
    assert "tiny_choice" in out
    assert "acc_norm" in out


@pytest.mark.parametrize("words", [("--tasks", "no_such_task"), ()])
def test_unknown_and_missing_tasks_are_one_line(words, tritium, tmp_path):
    status, _, err = tritium("eval", "lm-eval", tmp_path / "model", *words)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("tritium: eval lm-eval: expected --tasks with names of tasks")
    assert line.endswith("; `tritium eval lm-eval ls tasks` lists them")

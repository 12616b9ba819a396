import pytest

from tritium.errors import InputError
from tritium.model import GPTConfig
from tritium.train.config import PYTHON_PROMPT, ReportOptions, TrainConfig, named_files
from tritium.train.tasks import TASKS

pytestmark = pytest.mark.plain


def test_the_model_has_the_shape_of_the_options():
    shape = {"n_layer": 3, "d_model": 96, "n_head": 6, "n_kv_head": 2, "context_tokens": 32}
    config = TrainConfig.from_options(**shape)
    assert config.gpt(vocab_size=100) == GPTConfig(**shape, vocab_size=100)


def test_the_micro_batch_defaults_to_the_batch():
    assert TrainConfig.from_options(batch_size=8).micro_batch == 8
    assert TrainConfig.from_options(batch_size=8, micro_batch_size=2).micro_batch == 2


def test_options_round_trip():
    config = TrainConfig.from_options(steps=7, n_layer=2, device="cpu", prompt="a")
    assert TrainConfig.from_options(**config.options()) == config


@pytest.mark.parametrize("before", TASKS)
def test_another_task_brings_its_own_options(before):
    config = TrainConfig.from_options(task=before, steps=7)
    for task, row in TASKS.items():
        changed = config.with_options(task=task)
        assert (changed.task_options, changed.steps) == (row.options(), 7)


def test_files_of_evaluations_have_names():
    report = ReportOptions(eval_text=("wiki-2=a=b.txt",), eval_choice=("tasks/hellaswag.jsonl",))
    assert named_files(report) == {
        "eval_text": {"wiki-2": "a=b.txt"},
        "eval_choice": {"hellaswag": "tasks/hellaswag.jsonl"},
    }


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown option 'warmup'; did you mean 'warmup_steps'"):
        TrainConfig.from_options(warmup=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected 1 or more, and finite, got 0"),
        ({"lr": -1.0}, "lr: expected 0 or more, and finite, got -1.0"),
        ({"lr": float("nan")}, "lr: expected 0 or more, and finite, got nan"),
        ({"min_lr": float("inf")}, "min_lr: expected 0 or more, and finite, got inf"),
        ({"seed": 2**64}, "seed: expected a number from 0 to"),
        ({"beta2": 1.0}, r"beta2: expected a number in \[0, 1\), got 1.0"),
        ({"held_out": 0}, "held_out: expected a number between 0 and 1, got 0; 0.1 is usual"),
        (
            {"batch_size": 6, "micro_batch_size": 4},
            "micro_batch_size: expected a divisor of the batch size 6, got 4",
        ),
        (
            {"keep_every": 750},
            "keep_every: expected a multiple of the checkpoint",
        ),
        ({"micro_batch_size": 0}, "micro_batch_size: .* got 0"),
        ({"n_head": 5}, "^d_model: expected a multiple of `n_head`, 5, got 256"),
    ],
)
def test_values_out_of_range_raise_and_name_the_option(change, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.from_options(**change)


def test_samples_continue_python_only_if_the_data_is_python():
    assert TrainConfig(data=("stdlib", "python")).prompt == PYTHON_PROMPT
    assert TrainConfig(data=("stdlib", "mine.txt")).prompt == ""
    assert TrainConfig.from_options(data=("mine.txt",), prompt="Once").prompt == "Once"
    assert TrainConfig.from_options(prompt="").prompt == ""

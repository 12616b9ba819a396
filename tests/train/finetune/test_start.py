import pytest

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.finetune.start import default_config, finetune_config, finetune_tasks
from tritium.train.tasks import TASKS

pytestmark = pytest.mark.plain

SHAPE = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=257, context_tokens=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "exported"
    GPT(SHAPE).save_pretrained(folder)
    return folder


def test_the_run_has_the_shape_of_the_model_and_the_defaults_of_the_task(model):
    config = finetune_config("instruct", model, "f.json", dropout=0.1, lr=1e-3)
    assert config.gpt(257) == GPTConfig(**vars(SHAPE) | {"dropout": 0.1, "norm_eps": 1e-5})
    assert config.data == ("f.json",)
    assert config.init_from == str(model)
    assert config.lr == 1e-3
    assert config.batch_size == TASKS["instruct"].defaults["batch_size"]
    assert config.task_options.epochs == 3


def test_the_path_of_the_model_is_absolute(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert finetune_config("instruct", model.name, "f.json").init_from == str(model)


def test_steps_replace_epochs(model):
    config = finetune_config("instruct", model, "f.json", steps=7)
    assert (config.steps, config.task_options.epochs) == (7, None)
    assert finetune_config("instruct", model, "f.json", steps=7, epochs=None) == config
    with pytest.raises(InputError, match="steps: expected none with `epochs`, got both"):
        finetune_config("instruct", model, "f.json", steps=7, epochs=1)


def test_options_that_follow_from_the_model_raise(model):
    for name, value in {"n_layer": 3, "eval_interval": 1, "init_from": "x"}.items():
        with pytest.raises(InputError, match=f"{name}: expected no value, because it follows"):
            finetune_config("instruct", model, "f.json", **{name: value})


def test_unknown_tasks_and_options_suggest_the_nearest(model):
    assert "pretrain" not in finetune_tasks()
    for task in ("instrct", "pretrain"):
        with pytest.raises(InputError, match=f"unknown task '{task}'"):
            default_config(task)
    with pytest.raises(InputError, match="unknown option 'epoch'; did you mean 'epochs'"):
        finetune_config("instruct", model, "f.json", epoch=1)
    with pytest.raises(InputError, match="epochs: expected float"):
        finetune_config("instruct", model, "f.json", epochs="2")
    with pytest.raises(InputError, match="nowhere: expected a run, a checkpoint, a Hugging"):
        finetune_config("instruct", "nowhere", "f.json")

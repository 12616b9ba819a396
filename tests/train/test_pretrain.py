import numpy as np
import pytest

from tritium.errors import InputError
from tritium.model import GPT
from tritium.train import pretrain
from tritium.train.config import TrainConfig
from tritium.train.distributed.world import SINGLE_PROCESS
from tritium.train.execution import resolve
from tritium.train.pretrain import open_data

pytestmark = pytest.mark.plain


@pytest.fixture
def config(corpus, tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    return TrainConfig.from_options(
        data=(str(corpus),), tokenizer="bytes", batch_size=4, steps=5, n_layer=1, n_head=1,
        d_model=16, context_tokens=16, eval_tokens=64, sample_tokens=3, device="cpu",
    )  # fmt: skip


def test_batches_are_windows_of_the_text_and_depend_on_the_step_only(config):
    data = open_data(config)
    execution = resolve(config)
    loader, again = (data.loader(config, execution) for _ in range(2))
    inputs = loader.batch(3).model_inputs(execution.device)
    assert inputs.keys() == {"tokens", "targets"}
    assert inputs["tokens"].shape == (4, 16)
    assert (again.batch(3).windows == loader.batch(3).windows).all()
    masked = config.with_options(document_mask=True)
    inputs = data.loader(masked, execution).batch(3).model_inputs(execution.device, 7)
    assert inputs.keys() == {"tokens", "targets", "cu_seqlens", "dropout_seed"}


def test_the_last_evaluation_uses_all_held_out_text(config):
    data = open_data(config)
    execution = resolve(config)
    model = GPT(config.gpt(257))
    targets, losses = [], []
    for is_last in (False, True):
        batches = list(data.evaluation_batches(config, execution, is_last=is_last))
        targets.append(int(np.sum([batch.num_targets.sum() for batch in batches])))
        losses.append(data.evaluate(model, batches, SINGLE_PROCESS))
        rows = sum(map(len, batches))
    # The progress bar of the last evaluation counts to this number.
    assert rows == data.evaluation_rows(config)
    assert targets[0] == 64
    assert targets[1] == len(data.val) - 1 == losses[1].tokens
    bits = losses[0].loss / np.log(2) * data.info.val.tokens / data.info.val.bytes
    assert losses[0].bits_per_byte == pytest.approx(bits)


def test_a_sample_continues_the_prompt(config):
    data = open_data(config)
    text = data.sample(GPT(config.gpt(257)), config.with_options(prompt="the qu"))
    assert text.startswith("the qu")
    assert len(text) > len("the qu")


@pytest.mark.parametrize(
    ("tokenizer", "is_penalized"), [("bytes", False), ("chars", False), ("bpe:300", True)]
)
def test_a_sample_avoids_repetition_unless_tokens_are_bytes_or_characters(
    config, tokenizer, is_penalized, monkeypatch
):
    data = open_data(config.with_options(tokenizer=tokenizer))
    chosen = []
    monkeypatch.setattr(pretrain, "sample_text", lambda *arguments: chosen.append(arguments[-1]))
    data.sample(GPT(config.gpt(300)), config)
    assert (chosen[0].repetition_penalty > 1) == is_penalized
    assert (chosen[0].temperature, chosen[0].min_p) == (0.4, 0.2)


def test_data_that_is_shorter_than_a_window_raises_before_the_run(config):
    with pytest.raises(InputError, match="give more text or a shorter context"):
        open_data(config.with_options(context_tokens=100_000))

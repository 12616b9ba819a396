import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train.data.shards import TokenStream, write_shard
from tritium.train.eval.perplexity import _spread, measure, num_targets
from tritium.train.eval.texts import Text, read_text

pytestmark = pytest.mark.plain
CONTEXT = 16


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=50, context_tokens=CONTEXT)
    model = GPT(config).eval()
    # Predictions of new weights hardly depend on the context.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def text_of(*lengths: int, vocab_size: int = 50) -> Text:
    torch.manual_seed(1)
    arrays = [torch.randint(vocab_size, (n,)).numpy().astype(np.uint16) for n in lengths]
    total = sum(lengths)
    return Text(
        path=Path("text"),
        sha256="",
        sequences=[TokenStream([array]) for array in arrays],
        tokens=total,
        bytes=3 * total,
        words=total // 4,
    )


def brute_force(model: GPT, text: Text, stride: int) -> list[float]:
    """The loss of each token in a forward of its own."""
    losses = []
    for stream in text.sequences:
        tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
        for target in range(1, len(tokens)):
            window = max(0, math.ceil((target - CONTEXT) / stride))
            logits = model(tokens[None, window * stride : target])[0, -1]
            losses.append(F.cross_entropy(logits.double(), tokens[target]).item())
    return losses


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_windows_equal_brute_force_at_batch_sizes_1_and_7(model, stride):
    text = text_of(45, 2, 17)
    losses = brute_force(model, text, stride)
    expected = sum(losses) / len(losses)
    for batch_size in (1, 7):
        found = measure(model, text, context=CONTEXT, stride=stride, batch_size=batch_size)
        assert found.targets == len(losses) == 61
        assert found.loss == pytest.approx(expected, rel=1e-6)


def test_values_per_word_and_byte_follow_from_the_size_of_the_text(model):
    text = text_of(40)
    found = measure(model, text, context=CONTEXT, stride=8, batch_size=4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.word_perplexity == pytest.approx(math.exp(4 * found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / 3 / math.log(2))


def test_a_limit_evaluates_windows_spread_over_the_text(model):
    text = text_of(161)
    sizes = {"context": CONTEXT, "stride": CONTEXT}
    assert num_targets(text, **sizes) == 160
    done = []
    found = measure(model, text, **sizes, batch_size=1, max_targets=48, report=done.append)
    assert (found.targets, done) == (48, [16, 16, 16])


def test_a_text_shorter_than_a_window_raises(model):
    with pytest.raises(InputError, match="text: expected at least 16 tokens, one window, got 15"):
        measure(model, text_of(15), context=CONTEXT, stride=8, batch_size=1)


@torch.no_grad()
def transformers_guide(model, tokens: torch.Tensor, context: int, stride: int) -> float:
    """The counting of transformers' guide, with its labels and its weights."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        labels = tokens[None, begin:end].clone()
        labels[:, : done - end] = -100
        weight = int((labels != -100).sum()) - 1
        total += model(tokens[None, begin:end], labels=labels).loss.item() * weight
        count += weight
        done = end
        if end == len(tokens):
            break
    return total / count


@pytest.mark.parametrize("stride", [7, 16])
def test_the_counting_of_transformers_on_an_exported_model(model, stride, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = text_of(75).sequences[0].read(0, 75)
    write_shard(tmp_path / "tokens.bin", tokens, 50, "0" * 64)
    text = read_text(tmp_path / "tokens.bin", None, 50)
    expected = transformers_guide(theirs, torch.from_numpy(tokens.astype(np.int64)), 16, stride)
    sizes = {"context": 16, "stride": stride, "counting": "huggingface"}
    assert measure(model, text, **sizes, batch_size=3).loss == pytest.approx(expected, rel=1e-5)
    if stride < 16:
        exact = measure(model, text, context=16, stride=stride, batch_size=3).loss
        assert exact != pytest.approx(expected, rel=1e-4)


def test_the_counting_of_transformers_on_a_published_gpt2():
    transformers = pytest.importorskip("transformers")
    folder = Path(os.environ.get("TRITIUM_DATA", "../shared/data")) / "mgm-gpt2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = GPT.from_pretrained(folder)
    text = text_of(300, vocab_size=9669)
    tokens = torch.from_numpy(text.sequences[0].read(0, 300).astype(np.int64))
    expected = transformers_guide(theirs, tokens, 128, 64)
    sizes = {"context": 128, "stride": 64, "counting": "huggingface"}
    assert measure(ours, text, **sizes, batch_size=2).loss == pytest.approx(expected, rel=1e-5)


def test_a_part_of_the_windows_is_spread_over_the_text():
    places = [(index, SimpleNamespace(num_targets=16)) for index in range(10)]
    assert [index for index, _ in _spread(places, 48)] == [0, 3, 6]

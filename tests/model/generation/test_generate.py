import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritium.model import GPT, GPTConfig
from tritium.model.generation import Decoder, Sampling, generate, stream_text
from tritium.model.generation.generate import generate as function
from tritium.model.generation.sampling import choose, draw_numbers

pytestmark = pytest.mark.plain

CONFIG = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=50, context_tokens=16, n_kv_head=1)
DATA = Path(os.environ.get("TRITIUM_DATA") or Path(__file__).parents[3].parent / "shared" / "data")
TRAINED = DATA / "mgm-gpt2"
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}


def uncached(model, prompt: list[int], sampling: Sampling) -> list[int]:
    """Generate with a full forward per token."""
    tokens = list(prompt)
    with torch.no_grad():
        for draws in draw_numbers([sampling.seed or 0], sampling.max_new_tokens):
            logits = model(torch.tensor([tokens]))[:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, tokens] = True
            tokens.append(int(choose(logits, draws, sampling, seen)))
    return tokens


@pytest.fixture(params=["learned", "rotary"])
def model(request) -> GPT:
    return random_model(replace(CONFIG, position=request.param))


def random_model(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


# --- the same tokens as without a cache, and as alone


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {**SAMPLED, "repetition_penalty": 1.3}],
    ids=["greedy", "sampled"],
)
def test_cache_gives_the_tokens_of_full_forwards(model, options):
    prompts = [[3], [1, 2, 3, 4], [7, 7]]
    out = model.generate(prompts, 12, **options)
    for i, prompt in enumerate(prompts):
        seed = options.get("seed", 0) + i
        expected = uncached(model, prompt, Sampling(max_new_tokens=12, **{**options, "seed": seed}))
        assert out[i] == expected


def test_cache_gives_the_tokens_of_full_forwards_with_window_softcap_and_qk_norm():
    options = {"window": 5, "softcap": 3.0, "qk_norm": True, "position": "rotary"}
    model = random_model(replace(CONFIG, **options, tied_head=False, head_softcap=9.0))
    prompts = [[3], [1, 2, 3, 4, 5, 6]]
    sampling = Sampling(temperature=0.0, max_new_tokens=10)
    expected = [uncached(model, prompt, sampling) for prompt in prompts]
    assert model.generate(prompts, sampling=sampling) == expected


@pytest.mark.skipif(not TRAINED.exists(), reason="needs mgm-gpt2 in ../shared/data")
@pytest.mark.parametrize("options", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
def test_prompts_of_unequal_lengths_give_the_tokens_of_each_alone(options):
    """A trained model. The last bits of logits differ with the batch size, but no choice does."""
    model = GPT.from_pretrained(TRAINED)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(5, 9_669, (n,), generator=generator) for n in (1, 2, 3, 5, 8, 13, 21, 34)
    ]
    together = model.generate(prompts, 12, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate([prompt], 12, **{**options, "seed": 3 + i})
        assert torch.equal(together[i], alone[0]), i


# --- a context longer than the model


def test_full_context_continues_from_its_later_half(model):
    prompt = torch.randint(50, (1, 16))
    out = model.generate(prompt, 3, temperature=0.0)
    assert out[0, 16] == model(prompt)[:, -1].argmax(-1)
    assert out[0, 17] == model(out[:, 9:17])[:, -1].argmax(-1)


def test_sequences_whose_contexts_fill_at_different_steps_give_the_tokens_of_each_alone(model):
    prompts = [[1, 2, 3], [4] * 16, [5, 6, 7, 8, 9, 10, 11]]
    together = model.generate(prompts, 40, **SAMPLED)
    for i, prompt in enumerate(prompts):
        assert together[i] == model.generate([prompt], 40, **{**SAMPLED, "seed": 3 + i})[0]


def test_context_of_one_token_generates():
    model = GPT(replace(CONFIG, context_tokens=1))
    assert model.generate(torch.zeros(1, 1, dtype=torch.int64), 3).shape == (1, 4)


# --- seeds


def test_same_seed_gives_the_same_tokens(model):
    prompt = torch.randint(50, (2, 3))
    first = model.generate(prompt, 10, seed=1)
    assert torch.equal(model.generate(prompt, 10, seed=1), first)
    assert torch.equal(model.generate(prompt, 10, seeds=[1, 2]), first)
    assert not torch.equal(model.generate(prompt, 10, seed=2), first)


def test_without_a_seed_pytorch_chooses_one(model):
    prompt = torch.randint(50, (1, 3))
    torch.manual_seed(5)
    first = model.generate(prompt, 10)
    assert not torch.equal(model.generate(prompt, 10), first)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, 10), first)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-40}], ids=str
)
def test_limit_of_each_option_takes_the_most_likely_token(model, options):
    prompt = torch.randint(50, (2, 3))
    greedy = model.generate(prompt, 10, temperature=0.0)
    assert torch.equal(model.generate(prompt, 10, seed=3, **options), greedy)


# --- stops


class Letters:
    """Token i is the letter a + i % 26."""

    @staticmethod
    def decode_bytes(ids) -> bytes:
        return bytes(97 + i % 26 for i in ids)


def test_each_sequence_ends_after_its_own_stop(model):
    prompts = [[1, 2], [3, 4, 5]]
    greedy = model.generate(prompts, 12, temperature=0.0)
    new = [tokens[len(prompt) :] for tokens, prompt in zip(greedy, prompts, strict=True)]
    stop_tokens = (new[0][2], 49)
    out = model.generate(prompts, 12, temperature=0.0, stop_tokens=stop_tokens)
    for found, full, prompt in zip(out, greedy, prompts, strict=True):
        ends = [i for i in range(len(prompt), len(full)) if full[i] in stop_tokens]
        assert found == (full[: ends[0] + 1] if ends else full)

    texts = [Letters.decode_bytes(tokens).decode() for tokens in new]
    stop = texts[1][3:5]
    out = model.generate(prompts, 12, temperature=0.0, stop=(stop,), tokenizer=Letters)
    for found, full, text, prompt in zip(out, greedy, texts, prompts, strict=True):
        end = text.find(stop)
        assert found == (full[: len(prompt) + end + 2] if end >= 0 else full)


def test_sequences_of_a_tensor_that_stop_early_repeat_their_last_token(model):
    prompt = torch.tensor([[1, 2, 3], [9, 8, 7]])
    greedy = model.generate(prompt, 6, temperature=0.0)
    stop = int(greedy[0, 3])
    out = model.generate(prompt, 6, temperature=0.0, stop_tokens=(stop,))
    assert (out[0, 3:] == stop).all()
    ends = (greedy[1, 3:] == stop).nonzero()
    new = int(ends[0]) + 1 if len(ends) else 6
    assert out.shape == (2, 3 + new)
    assert torch.equal(out[1], greedy[1, : 3 + new])


def test_streamed_pieces_are_the_text_of_the_tokens(model):
    tokens = model.generate([[1, 2]], 30, seed=0)[0][2:]
    text = Letters.decode_bytes(tokens).decode()
    sampling = Sampling(max_new_tokens=30, seed=0)
    assert "".join(stream_text(model, Letters, [1, 2], sampling)) == text
    cut = replace(sampling, stop=(text[10:13],))
    assert "".join(stream_text(model, Letters, [1, 2], cut)) == text[: text.find(text[10:13])]
    ended = replace(sampling, stop_tokens=(tokens[4],))
    expected = text[: tokens.index(tokens[4])]
    assert "".join(stream_text(model, Letters, [1, 2], ended)) == expected


# --- types of prompts


def test_result_has_the_type_of_the_prompts(model):
    prompt = torch.randint(50, (2, 3))
    assert torch.equal(model.generate(prompt, 0), prompt)
    expected = model.generate(prompt, 4, temperature=0.0)
    assert model.generate(prompt.tolist(), 4, temperature=0.0) == expected.tolist()
    tensors = model.generate(list(prompt), 4, temperature=0.0)
    assert torch.equal(torch.stack(tensors), expected)
    assert model.generate([], 4) == []
    assert model.generate(prompt[:0], 4).shape == (0, 3)
    assert generate is function


def test_generation_works_under_autocast(model):
    """The dtype of keys and values then differs from the weights' dtype."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(torch.randint(50, (2, 3)), 20, seed=0).shape == (2, 23)


# --- bad input


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "generate: expected a prompt of 1 to 16 tokens.*got 0; give a prompt"),
        ([[1] * 17], {}, "generate: expected a prompt of 1 to 16 tokens.*got 17; shorten it"),
        ([[50]], {}, "generate: expected token ids from 0 to 49, got 50 to 50"),
        ([[1, -1]], {}, "generate: expected token ids from 0 to 49, got -1 to 1"),
        (torch.tensor([1, 2]), {}, r"expected prompts \(B, T\) or a list of prompts, got \(2,\)"),
        ([[1]], {"seeds": [1, 2]}, r"generate: expected a seed per sequence \(1\), got 2"),
        ([[1]], {"seeds": [-1]}, r"generate: expected seeds from 0 to 2\*\*63 - 1, got -1"),
        ([[1]], {"stop": ("a",)}, "generate: expected a tokenizer with the option stop"),
        ([[1]], {"topk": 1}, "generate: unknown option 'topk'; did you mean 'top_k'"),
        ([[1]], {"top_k": 0}, "top_k: expected at least 1, got 0"),
        ([[1]], {"sampling": Sampling(), "top_k": 1}, "`sampling` or its options, got both"),
        ([[1]], {"sampling": Sampling(), "max_new_tokens": 1}, "or its options, got both"),
    ],
)
def test_bad_input_raises(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        GPT(CONFIG).generate(prompts, **options)


def test_decoder_for_another_batch_or_sampling_raises(model):
    decoder = Decoder(model, 2, Sampling(top_k=3))
    with pytest.raises(ValueError, match=r"expected a decoder for 2 .*'top_k': 4.*'top_k': 3"):
        model.generate([[1], [2]], 3, top_k=4, decoder=decoder)
    with pytest.raises(ValueError, match="expected a decoder for 1 sequences"):
        model.generate([[1]], 3, top_k=3, decoder=decoder)
    with pytest.raises(ValueError, match="expected a decoder for 1 sequences"):
        next(stream_text(model, Letters, [1], Sampling(top_k=3), decoder=decoder))

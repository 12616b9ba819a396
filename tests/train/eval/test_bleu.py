import copy
import json

import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.model.generation import Sampling
from tritium.train.data.tokenizers.tokenizer import from_spec
from tritium.train.eval.bleu import Pair, bleu, generate_texts, open_bleu, read_pairs

pytestmark = pytest.mark.plain
BYTES = from_spec("bytes", list)


def read(tmp_path, *records) -> list[Pair]:
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return read_pairs(file)


def test_pairs_have_one_or_more_references(tmp_path):
    records = [{"prompt": "a", "reference": "b"}, {"prompt": "c", "references": ["d"]}]
    assert read(tmp_path, *records) == [Pair("a", ["b"]), Pair("c", ["d"])]
    for bad, message in (
        ({"prompt": "a"}, "f.jsonl:2: expected the key 'reference', got"),
        ({"reference": "a"}, "f.jsonl:2: expected the key 'prompt', got"),
        ({"prompt": "a", "references": []}, "f.jsonl:2: references: expected a list of texts"),
        ({"prompt": "a", "references": ["b", "c"]}, "f.jsonl:2: expected 1 references, as in"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, records[0], bad)


def test_texts_end_before_a_stop_text_and_do_not_depend_on_the_batch():
    config = GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=257, context_tokens=16)
    model = GPT(config).eval()
    prompts = ["abc", "b" * 40, "c"]
    sampling = Sampling(max_new_tokens=6, temperature=0)
    texts = [generate_texts(model, BYTES, prompts, sampling, batch_size=n) for n in (1, 3)]
    assert texts[0] == texts[1]
    stop = texts[0][0][2:4]
    sampling = Sampling(max_new_tokens=6, temperature=0, stop=(stop,))
    (text,) = generate_texts(model, BYTES, prompts[:1], sampling, batch_size=1)
    assert text == texts[0][0][: texts[0][0].index(stop)]


def test_a_long_prompt_loses_its_first_tokens():
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=257, context_tokens=16)
    model = GPT(config).eval()
    sampling = Sampling(max_new_tokens=6, temperature=0)
    prompts = ["a" * 20 + "0123456789abcdef", "0123456789abcdef", "a" * 16]
    long, end, begin = generate_texts(model, BYTES, prompts, sampling, batch_size=1)
    assert long == end != begin


def test_texts_are_decoded_as_answers():
    """Published tokenizers leave special tokens out of answers."""
    config = GPTConfig(n_layer=1, n_head=1, d_model=16, vocab_size=257, context_tokens=16)
    tokenizer = copy.copy(BYTES)
    tokenizer.decode_answer = lambda ids: f"an answer of {len(ids)} tokens"
    tokenizer.stop_tokens = ()
    sampling = Sampling(max_new_tokens=6, temperature=0)
    found = generate_texts(GPT(config).eval(), tokenizer, ["abc"], sampling, batch_size=1)
    assert found == ["an answer of 6 tokens"]


def test_equal_texts_have_a_bleu_of_100():
    pytest.importorskip("sacrebleu")
    pairs = [Pair("a", ["the quick brown fox jumps"]), Pair("b", ["over the very lazy dog"])]
    found = bleu(open_bleu(), [" the quick brown fox jumps", "over the very lazy dog\n"], pairs)
    assert found["bleu"] == pytest.approx(100)
    assert "nrefs:1" in found["signature"]
    assert bleu(open_bleu(), ["a b c d e", "f g h i j"], pairs)["bleu"] < 1


def test_texts_are_split_as_the_name_says():
    metrics = pytest.importorskip("sacrebleu").metrics
    pairs = [Pair("a", ["the quick-brown fox (jumps) over"])]
    texts = ["the quick brown fox jumps over"]
    for name in ("none", "13a", "intl", "char"):
        found = bleu(open_bleu(name), texts, pairs)
        expected = metrics.BLEU(tokenize=name).corpus_score(texts, [pairs[0].references])
        assert found["bleu"] == expected.score
        assert f"tok:{name}" in found["signature"]
    with pytest.raises(InputError, match="tokenize: unknown name '13'; did you mean '13a'"):
        open_bleu("13")


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("flores200", "sentencepiece", "Please .* pip install sentencepiece$"),
        ("ja-mecab", "MeCab", "Japanese tokenization requires extra dependencies"),
    ],
)
def test_a_tokenization_without_its_package_is_one_line(name, package, message, monkeypatch):
    pytest.importorskip("sacrebleu")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(InputError, match=f"^tokenize: {message}") as error:
        open_bleu(name)
    assert "\n" not in str(error.value)

import json
import os
import random
from pathlib import Path

import pytest

from tritium.train.data.tokenizers.for_transformers import save_for_transformers
from tritium.train.data.tokenizers.tokenizer import from_spec

pytestmark = pytest.mark.plain
transformers = pytest.importorskip("transformers")

DATA = Path(os.environ.get("TRITIUM_DATA") or Path(__file__).parents[4].parent / "shared" / "data")
ALPHABETS = (
    "abc XYZ'll don't 12345 07",
    " \t\r\n\u3000  ",
    "äöüßéñ",
    "日本語 中文",
    "العربية עברית",
    "👩‍👩‍👧 🇩🇪 é",
    "!?.,;:(){}[]",
)
CORPUS = ["def f(x):\n    return x + 10\n", *ALPHABETS] * 20


def mixed_strings(count: int) -> list[str]:
    draw = random.Random(0)
    strings = []
    for _ in range(count):
        alphabet = "".join(draw.sample(ALPHABETS, draw.randint(1, len(ALPHABETS))))
        strings.append("".join(draw.choices(alphabet, k=draw.randint(1, 60))))
    return strings


def test_the_class_of_the_tokenizer_is_one_that_transformers_4_has(tmp_path):
    save_for_transformers(from_spec("bytes", list), tmp_path, 128)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in settings


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300", "gpt2.tiktoken"])
def test_transformers_encodes_and_decodes_alike(spec, tmp_path):
    if spec == "gpt2.tiktoken":
        if not (DATA / spec).exists():
            pytest.skip(f"needs {spec} in ../shared/data or $TRITIUM_DATA")
        spec = str(DATA / spec)
    tokenizer = from_spec(spec, lambda: CORPUS)
    save_for_transformers(tokenizer, tmp_path, 128)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(other) == tokenizer.vocab_size
    assert other.eos_token_id == tokenizer.end_of_text
    for text in mixed_strings(1000):
        ids = tokenizer.encode(text).tolist()
        assert other.encode(text, add_special_tokens=False) == ids
        assert other.decode(ids) == tokenizer.decode(ids) == text

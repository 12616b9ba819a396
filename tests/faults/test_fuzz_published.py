"""Files of other programs with any content: each reader returns, or raises InputError.

`pytest -m slow tests/faults/test_fuzz_published.py` tries more examples.
"""

import json

import pytest
from hypothesis import strategies as st

from tests.faults.test_fuzz_folder import EXAMPLES, check, contents
from tests.model.models import SMALL, random_model
from tests.model.test_gguf import write_gguf
from tests.model.test_weights import published
from tests.train.data.tokenizers.test_published import byte_fallback, byte_level
from tritium.model import GPT
from tritium.model.config import AdapterOptions
from tritium.model.lora import add_lora, merge_adapter, merge_lora, save_adapter
from tritium.train.data.documents.corpus import Corpus
from tritium.train.data.tokenizers.tokenizer import Tokenizer

pytestmark = pytest.mark.plain


@st.composite
def damaged(draw, good: bytes, size: int | None = None) -> bytes:
    """Return `good` with up to four changed bytes among the first `size`, and perhaps cut short."""
    content = bytearray(good)
    places = st.integers(0, min(size or len(good), len(good)) - 1)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(places)] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_config_of_a_llama(examples, tmp_path):
    folder = tmp_path / "model"
    published("llama").save_pretrained(folder)
    file = folder / "config.json"
    base = json.loads(file.read_text())
    check(contents(base), examples, file, lambda: GPT.from_pretrained(folder))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_weights(examples, tmp_path):
    folder = tmp_path / "model"
    published("llama").save_pretrained(folder)
    file = folder / "model.safetensors"
    check(damaged(file.read_bytes(), 4000), examples, file, lambda: GPT.from_pretrained(folder))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_metadata_of_a_gguf_file(kind, examples, tmp_path):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "model.gguf"
    write_gguf(file, kind, published(kind))
    check(damaged(file.read_bytes(), 3000), examples, file, lambda: GPT.from_pretrained(file))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_config_of_an_adapter(examples, tmp_path):
    model = random_model(SMALL)
    add_lora(model, AdapterOptions(lora=3))
    folder = tmp_path / "adapter"
    save_adapter(model, folder, base="base")
    merge_lora(model)
    file = folder / "adapter_config.json"
    base = json.loads(file.read_text())
    # B is 0, so that a merge does not change the weights that the adapter expects.
    check(contents(base), examples, file, lambda: merge_adapter(model, folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("write", [byte_level, byte_fallback])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_files_of_a_tokenizer(examples, write, name, tmp_path):
    folder = tmp_path / "tokenizer"
    write(folder)
    file = folder / name
    base = json.loads(file.read_text())
    if name == "tokenizer.json":
        base["model"]["merges"] = base["model"]["merges"][:3]

    def read():
        tokenizer = Tokenizer.load(folder)
        tokenizer.decode(tokenizer.encode("ab \u00e9"))

    check(contents(base), examples, file, read)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_parquet(examples, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "folder" / "a.parquet"
    file.parent.mkdir()
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), file)
    check(damaged(file.read_bytes()), examples, file, lambda: list(Corpus([file]).documents()))

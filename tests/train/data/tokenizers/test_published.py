"""Tokenizers of published models: byte-level like GPT-2's, and with byte fallback like Llama's."""

import base64
import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.train.data.tokenizers.test_for_transformers import CORPUS, mixed_strings
from tritium.errors import InputError
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.data.tokenizers.tokenizer import Tokenizer, from_spec

pytestmark = pytest.mark.plain
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
# Puts a special token before a text without defining it.
UNDEFINED = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


def byte_level(folder, template=TEMPLATE):
    """Write a tokenizer like SmolLM2's. Its special tokens have the first ids."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=SPECIAL[0], eos_token=SPECIAL[1]
    )
    other.chat_template = template
    other.save_pretrained(folder)
    return other


def byte_fallback(folder):
    """Write a tokenizer like Llama's: ▁ for spaces, <0xNN> for bytes, and <s> before a text."""
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    ids = {name: i for i, name in enumerate(names)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    made.add_special_tokens(names[:3])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def test_a_byte_level_tokenizer_encodes_as_transformers_does(tmp_path):
    other = byte_level(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == len(other)
    assert tokenizer.end_of_text == other.eos_token_id == 1
    assert tokenizer.stop_tokens == (1,)
    assert tokenizer.start_tokens == ()
    assert tokenizer.can_cut
    texts = mixed_strings(300)
    for text, ids in zip(texts, tokenizer.encode_batch(texts, threads=2), strict=True):
        assert ids.tolist() == other.encode(text, add_special_tokens=False)
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


ADDED = functools.partial(tokenizers.AddedToken, normalized=False)
WORDS = r" ?\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pattern", "added", "can_cut"),
    [
        (WORDS, (), True),
        (WORDS, (ADDED("  "), ADDED("<one>"), ADDED(" one"), ADDED("one\n")), True),
        (WORDS, (ADDED("two words"),), False),
        (WORDS, (ADDED("\none"),), False),
        (WORDS, (ADDED("one "),), False),
        (WORDS, (ADDED("<one>", lstrip=True),), False),
        (WORDS, (ADDED("one", rstrip=True),), False),
        (WORDS.replace(r"\n", r"\n/"), (), False),
        (r"\p{N}", (), False),
    ],
)
def test_text_is_cut_only_where_the_tokenizer_ends_a_piece(pattern, added, can_cut, tmp_path):
    byte_level(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pre_tokenizers = tokenizers.pre_tokenizers
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.add_tokens(list(added))
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).can_cut == can_cut


def test_bytes_of_single_ids_join_to_the_text(tmp_path):
    byte_level(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("日本語 é")
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == "日本語 é".encode()
    assert tokenizer.decode_bytes([tokenizer.vocab_size + 5]) == b""


def test_an_added_token_stands_for_its_own_text(tmp_path):
    """Also if its characters are those that stand for bytes in other tokens."""
    byte_level(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_tokens([ADDED("<é>")])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a<é>é")
    assert made.token_to_id("<é>") in ids
    assert tokenizer.decode(ids) == "a<é>é"


def test_special_tokens_are_read_in_rendered_text_only(tmp_path):
    other = byte_level(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "é 12?"}]
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    assert text == "<|im_start|>user\né 12?<|im_end|>\n<|im_start|>assistant\n"
    expected = other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode_rendered(text).tolist() == expected
    assert tokenizer.decode(expected) == text
    assert not {0, 1} & set(tokenizer.encode(text).tolist())
    assert "assistant" not in tokenizer.render_chat(messages, add_generation_prompt=False)


def test_a_byte_fallback_tokenizer_gives_bytes_and_start_tokens(tmp_path):
    other = byte_fallback(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.start_tokens == (1,)
    assert tokenizer.end_of_text == 2
    assert not tokenizer.can_cut
    ids = tokenizer.encode("ab cab é")
    assert ids.tolist() == other.encode("ab cab é", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == " ab cab é"
    assert tokenizer.decode(ids[1:]) == " cab é"
    assert tokenizer.token_ids == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("write", "settings", "answer"),
    [
        (byte_fallback, {"eos_token": "</s>"}, "ab cab é"),
        # A token that only tokenizer_config.json calls special.
        (byte_level, {"pad_token": "!"}, "ab cabé"),
    ],
)
def test_an_answer_is_decoded_as_transformers_does(write, settings, answer, tmp_path):
    write(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | settings))
    tokenizer = Tokenizer.load(tmp_path)
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    draw = np.random.default_rng(0)
    lists = [draw.integers(tokenizer.vocab_size, size=length) for length in [0, 1, 2, 3, 9] * 20]
    for ids in [*lists, tokenizer.encode("!"), tokenizer.encode(" ab! ")]:
        expected = other.decode(ids.tolist(), skip_special_tokens=True)
        assert tokenizer.decode_answer(ids) == expected
    ids = [*tokenizer.encode("ab cab"), tokenizer.end_of_text, *tokenizer.encode("é")]
    assert tokenizer.decode_answer(ids) == answer


def test_a_dataset_has_start_and_end_tokens_and_keeps_the_files(tmp_path):
    byte_fallback(tmp_path / "llama")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"ab c{i}" * 9)
    build(tmp_path / "out", [tmp_path], str(tmp_path / "llama"), held_out=0.4, progress=False)
    dataset = open_dataset(tmp_path / "out")
    tokens = dataset.train.read(0, len(dataset.train)).tolist()
    assert tokens[0] == 1
    assert tokens[tokens.index(2) + 1] == 1
    assert (
        dataset.tokenizer.files["tokenizer.json"]
        == (tmp_path / "llama" / "tokenizer.json").read_bytes()
    )


def test_save_and_load_keep_the_definition(tmp_path):
    byte_level(tmp_path / "folder")
    tokenizer = from_spec(str(tmp_path / "folder"), list)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.sha256, loaded.name) == (tokenizer.sha256, "folder")
    assert loaded.files == tokenizer.files
    assert loaded.chat_template == TEMPLATE
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"sha256": "0" * 64}))
    with pytest.raises(InputError, match="damaged: expected sha256 000000000000"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"else \(expected the format .*give its folder"):
        Tokenizer.load(tmp_path / "folder" / "tokenizer.json")


def test_a_changed_file_in_a_saved_tokenizer_raises(tmp_path):
    byte_level(tmp_path / "folder")
    saved = tmp_path / "tokenizer.json"
    Tokenizer.load(tmp_path / "folder").save(saved)
    content = json.loads(saved.read_bytes())
    for name, text in content["files"].items():
        changed = base64.b64encode(base64.b64decode(text).replace(b"i", b"a", 1)).decode()
        assert changed != text
        saved.write_text(json.dumps(content | {"files": content["files"] | {name: changed}}))
        with pytest.raises(InputError, match=r"tokenizer\.json: "):
            Tokenizer.load(saved)
    files = content["files"]
    renamed = {
        "added_tokens.json" if name.endswith(".jinja") else name: files[name] for name in files
    }
    assert renamed != files
    saved.write_text(json.dumps(content | {"files": renamed}))
    with pytest.raises(InputError, match="a file in it does not match its checksum"):
        Tokenizer.load(saved)
    del content["files_sha256"]  # as older versions wrote it
    saved.write_text(json.dumps(content))
    assert Tokenizer.load(saved).chat_template == TEMPLATE


def test_vocab_and_merges_are_converted(tmp_path):
    byte_level(tmp_path / "new")
    definition = json.loads((tmp_path / "new" / "tokenizer.json").read_bytes())
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]]
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": SPECIAL[1]}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(old)
    assert tokenizer.end_of_text == 1
    expected = Tokenizer.load(tmp_path / "new").encode("def f(x): é")
    np.testing.assert_array_equal(tokenizer.encode("def f(x): é"), expected)


def test_a_folder_that_names_no_special_tokens_has_those_of_its_model_type(tmp_path, monkeypatch):
    """As GPT-2's folder on Hugging Face."""
    byte_level(tmp_path, template=None)
    for file in tmp_path.iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    file = tmp_path / "tokenizer.json"
    named = file.read_text()
    file.write_text(named.replace(SPECIAL[1], "<|endoftext|>"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = Tokenizer.load(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.end_of_text == other.eos_token_id == 1
    assert tokenizer.token_ids == {"bos_token_id": 1, "eos_token_id": 1}
    assert tokenizer.files["tokenizer.json"] == file.read_bytes()
    assert tokenizer.encode("def f(x): é").tolist() == other.encode("def f(x): é")
    # transformers would add the token to this vocabulary.
    file.write_text(named)
    with pytest.raises(InputError, match=r"in the vocabulary, got '<\|endoftext\|>'"):
        Tokenizer.load(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError, match=r"package transformers, found none; pip") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_special_tokens_of_the_configuration_win_over_those_of_their_own_file(tmp_path):
    byte_level(tmp_path, template="{{ eos_token }} {{ pad_token }}")
    others = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(others))
    assert Tokenizer.load(tmp_path).render_chat([]) == f"{SPECIAL[1]} {SPECIAL[0]}"


def test_chat_templates_by_name_and_ids_that_stop(tmp_path):
    byte_level(tmp_path, template=None)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_bytes())
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    file.write_text(json.dumps(settings | {"chat_template": named}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template == "y"
    assert tokenizer.stop_tokens == (1, 5)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match=r"chat template of .* raised TemplateError: no system"):
        Tokenizer.load(tmp_path).render_chat([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder: expected"),
        ({"decoder": {"pattern": {"String": "x"}, "content": " "}}, "decoder: .* got None"),
        (
            {"decoder": {"type": "Replace", "pattern": {"Regex": "x"}, "content": " "}},
            "decoder: expected Replace with a String",
        ),
        (
            {"decoder": {"type": "Replace", "pattern": {"String": "x"}, "content": ""}},
            "decoder: expected ByteLevel, .* got Replace",
        ),
        ({"model": {"type": "words"}}, "expected a file of the package tokenizers"),
        (
            {"post_processor": UNDEFINED},
            "expected a definition of each special token of post_processor, got none for <none>",
        ),
        (
            {"post_processor": {"type": "Sequence", "processors": [UNDEFINED]}},
            "expected a definition of each special token of post_processor, got none for <none>",
        ),
    ],
)
def test_definitions_that_are_not_supported_raise(changes, message, tmp_path):
    byte_level(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path)


def test_errors_of_the_package_while_encoding_raise(tmp_path, monkeypatch):
    byte_level(tmp_path)
    file = tmp_path / "tokenizer.json"
    words = {"type": "WordLevel", "vocab": {"a": 0, "<|im_end|>": 1}, "unk_token": "x"}
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"model": words}))
    tokenizer = Tokenizer.load(tmp_path)
    message = "expected a definition that encodes every text, got the error .*; get the file again"
    with pytest.raises(InputError, match=message):
        tokenizer.encode("b")
    with pytest.raises(InputError, match=message):
        tokenizer.encode_batch(["a", "b"], threads=2)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_plain", SimpleNamespace(encode=interrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_too_large_id_raises(tmp_path):
    byte_level(tmp_path)
    file = tmp_path / "tokenizer.json"
    definition = json.loads(file.read_bytes())
    definition["model"]["vocab"]["a"] = 1 << 24
    file.write_text(json.dumps(definition))
    with pytest.raises(InputError, match="expected ids below 16777216, got 16777216"):
        Tokenizer.load(tmp_path)


def test_folders_without_a_tokenizer_or_its_end_of_text_raise(tmp_path, monkeypatch):
    byte_level(tmp_path / "folder")
    settings = tmp_path / "folder" / "tokenizer_config.json"
    settings.write_text("[")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: expected a JSON object"):
        Tokenizer.load(tmp_path / "folder")
    settings.write_text("{}")
    with pytest.raises(InputError, match=r"expected an eos_token .* got None"):
        Tokenizer.load(tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"expected a folder with tokenizer\.json, found none"):
        Tokenizer.load(tmp_path / "folder")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer_config.json", {"chat_template": ["x"]}, "objects with name and template"),
        (
            "tokenizer_config.json",
            {"add_bos_token": True, "bos_token": "<none>"},
            "expected a bos_token .* got '<none>'",
        ),
        ("generation_config.json", {"eos_token_id": [{}]}, r"as eos_token_id, got \[{}\]"),
        ("generation_config.json", {"eos_token_id": "abc"}, "as eos_token_id, got abc"),
    ],
)
def test_settings_with_other_types_raise(name, changes, message, tmp_path):
    byte_level(tmp_path, template=None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    (tmp_path / name).write_text(json.dumps(settings | changes))
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    byte_level(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(
        InputError, match=r"package tokenizers, found none; pip install 'tritium\[hf"
    ):
        Tokenizer.load(tmp_path)

"""Our tokenizers as tokenizers of transformers, which give the same ids.

One difference is intended: `<|endoftext|>` in a text becomes the end-of-text id there. Here it is
encoded like any other text.
"""

import base64
import json
import re
import tempfile
from pathlib import Path

from ....errors import InputError
from .tokenizer import END_OF_TEXT, Tokenizer

# `++`, `?+`, `*+` and `{1,2}+`. The regular expressions of the tokenizers package have another
# meaning for the last one. Both patterns of tokenizer.py match the same without the second sign.
_POSSESSIVE = re.compile(r"([+?*}])\+")
_ANY_CHARACTER = r"[\s\S]"


def save_for_transformers(
    tokenizer: Tokenizer, folder: Path, context_tokens: int, *, pads: bool = False
) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer loads.

    Args: pads: whether end-of-text is also the padding, which a classifier of batches needs.
    Raises: InputError if the package transformers is not installed.
    """
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise InputError(
            "export: expected the package transformers, which writes the tokenizer, found none; "
            "pip install 'tritium[hf]'"
        ) from None
    converted = (
        _convert_chars(tokenizer) if tokenizer.kind == "chars" else _convert_bytes(tokenizer)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=converted,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context_tokens,
        # Otherwise decode() changes spaces before punctuation.
        clean_up_tokenization_spaces=False,
        **({"pad_token": END_OF_TEXT} if pads else {}),
    ).save_pretrained(folder)
    _name_class_of_version_4(folder / "tokenizer_config.json")


def _name_class_of_version_4(file: Path) -> None:
    """Name the class by which transformers 4 and 5 both know the tokenizer."""
    settings = json.loads(file.read_bytes())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    file.write_text(json.dumps(settings, indent=2))


def _convert_bytes(tokenizer: Tokenizer):
    """Convert a tokenizer whose pieces are bytes, with the converter of transformers."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = _POSSESSIVE.sub(r"\1", tokenizer.pattern) or _ANY_CHARACTER
    with tempfile.NamedTemporaryFile() as ranks:
        for rank, piece in enumerate(tokenizer.pieces[:-1]):
            ranks.write(base64.b64encode(piece) + b" %d\n" % rank)
        ranks.flush()
        return TikTokenConverter(
            vocab_file=ranks.name, pattern=pattern, extra_special_tokens=[END_OF_TEXT]
        ).converted()


def _convert_chars(tokenizer: Tokenizer):
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Converted

    ids = {piece.decode(): number for number, piece in enumerate(tokenizer.pieces[:-1])}
    converted = Converted(models.BPE(ids, []))
    converted.pre_tokenizer = pre_tokenizers.Split(Regex(_ANY_CHARACTER), behavior="isolated")
    converted.decoder = decoders.Fuse()
    converted.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return converted

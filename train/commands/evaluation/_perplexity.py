"""tritium eval perplexity: how likely a model finds texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ....errors import InputError
from ...eval.windows import COUNTINGS, check_sizes
from ...terminal.console import loading
from ...terminal.progress import progress
from ..cli import parse
from ._options import EvaluationOptions

if TYPE_CHECKING:
    from ...eval.perplexity import Perplexity
    from ...eval.texts import Text

_DESCRIPTION = """Compute the perplexity of texts, in windows with a stride.


exact: each token is predicted once. huggingface: the counting of transformers' guide "Perplexity of fixed-length models", for comparisons with its numbers."""  # noqa: E501 - --help keeps line breaks


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(EvaluationOptions):
    """Options of `tritium eval perplexity`."""

    texts: tyro.conf.Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(required)"),
        ]
    ]
    """Files of text, jsonl files, datasets (their validation split), token shards."""
    text_field: str = "text"
    """Key of the objects in jsonl files that holds the text."""
    context_tokens: int | None = None
    """Tokens per window. None: the context of the model."""
    stride: int | None = None
    """Tokens between the beginnings of windows. None: half of the context."""
    counting: Literal[tuple(COUNTINGS)] = "exact"
    """exact: each token is predicted once; huggingface: as transformers' guide counts."""

    def __post_init__(self):
        super().__post_init__()
        if not self.texts:
            raise InputError("eval perplexity: expected one text or more after MODEL, got none")


def main(argv: Sequence[str]) -> int:
    """Run `tritium eval perplexity`."""
    options = parse(
        PerplexityOptions, argv, prog="tritium eval perplexity", description=_DESCRIPTION
    )
    with loading():
        from ...eval.perplexity import measure, num_targets
        from ...eval.texts import read_text

    model = options.open()
    longest = model.gpt.config.context_tokens
    context = longest if options.context_tokens is None else options.context_tokens
    stride = max(1, context // 2) if options.stride is None else options.stride
    check_sizes(context, stride, longest)
    vocab_size = model.gpt.config.vocab_size
    texts = [
        read_text(
            Path(path),
            model.tokenizer,
            vocab_size,
            counting=options.counting,
            text_field=options.text_field,
        )
        for path in options.texts
    ]
    sizes = {"context": context, "stride": stride, "counting": options.counting}
    totals = [num_targets(text, **sizes) for text in texts]
    print(f"context {context}, stride {stride}, counting {options.counting}")
    results = []
    for text, total in zip(texts, totals, strict=True):
        with progress(text.path.name, total) as report:
            found = measure(model.gpt, text, **sizes, batch_size=options.batch_size, report=report)
        print(_describe(text, found))
        results.append(_record(text, found))
    options.write(model, "perplexity", list(argv), sizes | {"texts": results})
    return 0


def _describe(text: "Text", found: "Perplexity") -> str:
    line = (
        f"{text.path}: {found.loss:.4f} nats per token over {found.targets:,} tokens, "
        f"perplexity {_rounded(found.perplexity)}"
    )
    if found.word_perplexity is not None:
        line += f" per token, {_rounded(found.word_perplexity)} per word"
    if found.bits_per_byte is not None:
        line += f", {found.bits_per_byte:.4f} bits per byte"
    return line


def _rounded(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def _record(text: "Text", found: "Perplexity") -> dict:
    return {
        "path": str(text.path.resolve()),
        "sha256": text.sha256,
        "tokens": text.tokens,
        "bytes": text.bytes,
        "words": text.words,
        "targets": found.targets,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "word_perplexity": found.word_perplexity,
        "bits_per_byte": found.bits_per_byte,
    }

"""tritium eval bleu: generated texts against references."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ....errors import InputError, plural
from ...storage.files import hash_file
from ...terminal.console import loading
from ...terminal.progress import progress
from ..cli import parse
from ._options import EvaluationOptions

_DESCRIPTION = """Compute the BLEU of texts that the model writes, with sacrebleu.


FILE has one JSON object per line: {"prompt": TEXT, "reference": TEXT}, or "references" with a list of texts. The model always writes the most likely token."""  # noqa: E501 - --help keeps line breaks


@dataclass(frozen=True, kw_only=True)
class BleuOptions(EvaluationOptions):
    """Options of `tritium eval bleu`."""

    file: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]]
    """A jsonl file."""
    max_new_tokens: int = 128
    """Maximum number of tokens to write per prompt."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that ends an answer. Can be given several times. None given: the end of a line."""
    tokenize: str = "13a"
    """How sacrebleu splits texts into words: none, zh, 13a, intl, char or another of its names."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium eval bleu`."""
    options = parse(BleuOptions, argv, prog="tritium eval bleu", description=_DESCRIPTION)
    with loading():
        from ....model.generation import Sampling
        from ...eval.bleu import bleu, generate_texts, open_bleu, read_pairs

    metric = open_bleu(options.tokenize)
    path = Path(options.file)
    pairs = read_pairs(path)
    stop = options.stop or ("\n",)
    try:
        sampling = Sampling(max_new_tokens=options.max_new_tokens, temperature=0, stop=stop)
    except ValueError as error:
        raise InputError(str(error)) from None
    model = options.open()
    with progress(path.name, len(pairs)) as report:
        texts = generate_texts(
            model.gpt,
            model.needed_tokenizer(),
            [pair.prompt for pair in pairs],
            sampling,
            batch_size=options.batch_size,
            report=report,
        )
    found = bleu(metric, texts, pairs)
    print(
        f"{path}: BLEU {found['bleu']:.2f} over {plural(len(pairs), 'text')} ({found['signature']})"
    )
    results = {
        "path": str(path.resolve()),
        "sha256": hash_file(path),
        "stop": list(stop),
        "texts": texts,
        **found,
    }
    options.write(model, "bleu", list(argv), results)
    return 0

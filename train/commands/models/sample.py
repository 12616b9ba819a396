"""tritium sample: generate text with a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass

from ....errors import InputError
from ..cli import parse
from ._generation import GenerationOptions


@dataclass(frozen=True, kw_only=True)
class SampleOptions(GenerationOptions):
    """Options of `tritium sample`."""

    prompt: str | None = None
    """Text to continue. None: the start of a document."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium sample`."""
    options = parse(
        SampleOptions, argv, prog="tritium sample", description="Generate text with a model."
    )
    from ...generation.text import encode_prompt, stream_sample

    sampling = options.sampling()
    model, tokenizer = options.load()
    prompt = encode_prompt(tokenizer, options.prompt)
    context = model.config.context_tokens
    if len(prompt) > context:
        raise InputError(
            f"prompt: expected at most {context} tokens, the context of the model, "
            f"got {len(prompt)}; shorten it"
        )
    print(options.prompt or "", end="", flush=True)
    for piece in stream_sample(model, tokenizer, prompt, sampling):
        print(piece, end="", flush=True)
    print()
    return 0

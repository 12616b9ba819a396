"""Options that `tritium sample` and `tritium chat` share."""

import secrets
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ....errors import InputError
from ...machine.options import OpenOptions

if TYPE_CHECKING:
    from ....model import GPT
    from ....model.generation import Sampling
    from ...data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of commands that generate text."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run (its newest checkpoint), a checkpoint, a Hugging Face folder or a GGUF file."""
    max_new_tokens: int = 200
    """Maximum number of tokens to generate."""
    temperature: float = 0.8
    """Sampling temperature. 0: always the most likely token."""
    top_k: int | None = None
    """Sample from the k most likely tokens. None: from all."""
    top_p: float | None = 0.95
    """Sample from the most likely tokens that have this probability in total. None: from all."""
    min_p: float | None = None
    """Sample from tokens with at least this fraction of the largest probability. None: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are already in the text become less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that ends the output and is not part of it. Can be given several times."""
    seed: int | None = None
    """The same seed gives the same text. None: a different text each time."""
    opening: tyro.conf.OmitArgPrefixes[OpenOptions]

    def sampling(self) -> "Sampling":
        """Return the options of generation. Raises: InputError if one is out of range."""
        # The methods import what needs PyTorch, whose import takes seconds: --help does not call
        # them.
        from ....model.generation import Sampling

        names = {field.name for field in fields(Sampling)} & {field.name for field in fields(self)}
        options = {name: getattr(self, name) for name in names}
        if self.seed is None:
            options["seed"] = secrets.randbits(62)
        try:
            return Sampling(**options)
        except ValueError as error:
            raise InputError(str(error)) from None

    def load(self) -> tuple["GPT", "Tokenizer"]:
        """Read the model, on its device and in its precision, and its tokenizer."""
        from ...eval.model import OpenedModel

        opened = OpenedModel.open(Path(self.model), self.opening, needs_tokenizer=True)
        return opened.gpt, opened.needed_tokenizer()

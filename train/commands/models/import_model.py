"""tritium import: make a published model a folder that tritium and transformers open."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ....errors import InputError
from ....model.hub import download, is_hub_name
from ..cli import as_flags, parse, program


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of `tritium import`."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SRC")]]
    """A Hugging Face folder, FILE.gguf, nanoGPT's ckpt.pt, or OWNER/NAME on huggingface.co."""
    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT_DIR")]]
    """New folder, in the format of transformers."""
    revision: str | None = None
    """Branch, tag or commit of OWNER/NAME. None: main."""
    tokenizer: str | None = None
    """A tokenizer for a model without one: bytes, gpt2, FILE.tiktoken, FILE.json or FOLDER."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in the folder. auto: as they are, so that no bit changes."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium import`."""
    options = parse(
        ImportOptions,
        argv,
        prog="tritium import",
        description="Make a published model a folder that tritium and transformers open.",
    )
    from ...run.models import open_model
    from ._model_folder import model_card, write_model

    path = Path(options.source)
    if is_hub_name(options.source):
        path = download(options.source, options.revision)
        print(f"{options.source}: revision {path.name}")
    elif options.revision is not None:
        raise InputError(
            f"revision: expected it with OWNER/NAME on huggingface.co only, got {options.source}"
        )
    trained = open_model(path)
    if trained.run is not None:
        raise InputError(
            f"{path}: expected a published model, got a run; `tritium export` writes a run"
        )
    out = Path(options.out)
    write_model(trained, out, model_card(trained), dtype=options.dtype, spec=options.tokenizer)
    try:
        open_model(out).tokenizer()
    except InputError as error:
        message = as_flags(str(error))
        hint = "give another one to the commands that need it: --tokenizer"
        print(message if "--tokenizer" in message else f"{message}; {hint}")
    else:
        print(f"next: {program()} sample {shlex.quote(options.out)} --prompt Once")
    return 0

"""Download published models from huggingface.co, through the package huggingface_hub."""

import re
from pathlib import Path

from ..errors import InputError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PATTERNS = ("*.json", "*.txt", "*.jinja", "tokenizer.model")


def is_hub_name(name: str) -> bool:
    """Return whether `name` is owner/name and no file or folder."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def download(name: str, revision: str | None = None) -> Path:
    """Download a model, or find it in the cache of huggingface_hub.

    Args:
        name: owner/name.
        revision: branch, tag or commit. Default: main.
    Returns: the folder. Its name is the commit.
    Raises: InputError if there is no such model, or no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name}: expected the package huggingface_hub to download it, found none; "
            "pip install 'tritium[hf]'"
        ) from None
    try:
        # A repository can have the weights twice. Take pytorch_model.bin only if there is no other.
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = [*_PATTERNS, weights]
            found = snapshot_download(name, revision=revision, allow_patterns=patterns)
            if any(Path(found).glob(weights)):
                break
        return Path(found)
    except Exception as error:  # the package and its network library raise many types
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{name}: expected a folder, a file, or a model that huggingface.co has, got "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from None

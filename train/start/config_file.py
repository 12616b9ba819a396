"""Options of a run in a file: a run's own config.json, or TOML.

    # my.toml: names as in `tritium train --help`, with _ or -
    recipe = "laptop"          # options that the file does not name; default: those of TrainConfig
    data = ["my.txt"]
    n_layer = 6
    lr = 1e-3

The command line may change any of them. `to_toml` writes a configuration in this format.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..config import OPTION_CLASSES, PART_OF, TrainConfig
from ..recipes import recipe
from ..storage.records import check_names, check_types, parse_object

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def read_config(path: Path) -> TrainConfig:
    """Read the options in a file. A new run does not take the folder of the run in config.json.

    Raises: InputError that names the file, and the line of an option that is wrong; OSError.
    """
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(
                f"{path}: expected a TOML file or the folder of a run (with config.json), got a "
                "folder without config.json"
            )
        path = path / "config.json"
    text = path.read_bytes().decode("utf-8", "replace")
    is_record = path.suffix == ".json"
    options = _options_of_run(path, text) if is_record else _parse_toml(path, text)
    base = TrainConfig()
    if "recipe" in options and not is_record:
        with _names_line(path, text, "recipe"):
            name = options.pop("recipe")
            if not isinstance(name, str):
                raise InputError(f"recipe: expected str, got {name!r}; write one name")
            base = recipe(name)
    for name in options:
        with _names_line(path, text, name):
            check_names("option", [name], PART_OF)
            for part in OPTION_CLASSES:
                check_types({name: options[name]}, part)
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    try:
        config = base.with_options(**options | lists)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if config.task != "pretrain":
        raise InputError(
            f"{path}: expected the options of a run of `tritium train`, got one of the task "
            f"{config.task}"
        )
    return config


@contextlib.contextmanager
def _names_line(path: Path, text: str, name: str) -> Iterator[None]:
    """Add the file and the line of an option to an InputError of the context."""
    try:
        yield
    except InputError as error:
        spelled = name.replace("_", "[_-]")
        match = re.search(rf'^[ \t]*"?{spelled}"?\s*[=:]', text, re.MULTILINE)
        line = f":{text[: match.start(0)].count(chr(10)) + 1}" if match else ""
        raise InputError(f"{path}{line}: {error}") from None


def _options_of_run(path: Path, text: str) -> dict[str, Any]:
    try:
        options = parse_object(text)["train"]
        if not isinstance(options, dict):
            raise ValueError("expected an object")
    except (ValueError, KeyError):
        raise InputError(
            f"{path}: expected the config.json of a run, got something else; options of your own "
            "are written in TOML"
        ) from None
    options.pop("out", None)
    return options


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: expected TOML, got a syntax error: {error}") from None
    for name, value in found.items():
        if isinstance(value, dict):
            raise InputError(
                f"{path}: expected options without tables, such as n_layer = 6, got [{name}]"
            )
    options = {}
    for spelled, value in found.items():
        name = spelled.replace("-", "_")
        if name in options:
            with _names_line(path, text, name):
                raise InputError(f"{name}: expected one value, got two, with - and with _")
        options[name] = value
    return options


def to_toml(config: TrainConfig) -> str:
    """Return the options as TOML that `read_config` reads. Options that are None are comments."""
    lines = []
    for name, value in config.options().items():
        if name in ("task", "out"):
            continue
        if value is None:
            lines.append(f"# {name}: none")
        elif isinstance(value, tuple):
            lines.append(f"{name} = {json.dumps(list(value), ensure_ascii=False)}")
        else:
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"

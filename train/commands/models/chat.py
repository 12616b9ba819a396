"""tritium chat: chat with a trained model in the terminal."""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import InputError, describe_os_error, plural, unknown_name
from ..cli import parse
from ._generation import GenerationOptions

if TYPE_CHECKING:
    from ...generation.chat import Conversation

_HELP = """/reset      forget the conversation
/save FILE  write the conversation to a new JSON file
/help       show this list
/exit       leave; so does Ctrl-D
Ctrl-C      stop an answer"""
_COMMANDS = ("/reset", "/save", "/help", "/exit")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(GenerationOptions):
    """Options of `tritium chat`."""

    system: str | None = None
    """System message. None: the default of the chat template."""
    max_new_tokens: int = 512
    """Maximum number of tokens per answer."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium chat`."""
    options = parse(
        ChatOptions, argv, prog="tritium chat", description="Chat with a trained model."
    )
    from ...generation.chat import Conversation
    from ...run.models import open_model

    sampling = options.sampling()
    model, tokenizer = options.load()
    template = open_model(Path(options.model)).template
    conversation = Conversation(model, tokenizer, sampling, options.system, template)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may have bytes that are not UTF-8
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - makes input() edit lines
        name = conversation.template
        template = "its chat template" if name is None else f"the template {name}"
        print(f"{options.model}, with {template}. /help lists the commands.")
    while (line := _read_line(is_terminal)) is not None:
        if line == "/exit":
            break
        try:
            _answer(conversation, line)
        except InputError as error:
            print(f"tritium: {error}", file=sys.stderr, flush=True)
        except OSError as error:
            print(f"tritium: {describe_os_error(error)}", file=sys.stderr, flush=True)
    return 0


def _read_line(is_terminal: bool) -> str | None:
    """Return the next line, or None at the end of the input."""
    while True:
        try:
            return input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\nCtrl-D or /exit leaves")


def _answer(conversation: "Conversation", line: str) -> None:
    """Run a command, or print the answer to a question."""
    command, _, argument = line.partition(" ")
    if not line:
        return
    if command == "/help":
        print(_HELP, flush=True)
    elif command == "/reset":
        conversation.reset()
        print("the conversation is empty", flush=True)
    elif command == "/save":
        if not argument.strip():
            raise InputError("/save: expected the name of a file, got none")
        conversation.save(Path(argument.strip()).expanduser())
        print(f"saved {plural(len(conversation.messages), 'message')}", flush=True)
    elif command.startswith("/") and "/" not in command[1:]:
        raise InputError(unknown_name("command", command, _COMMANDS))
    else:
        _print_answer(conversation, line)


def _print_answer(conversation: "Conversation", question: str) -> None:
    # Closing the answer adds the messages, also after Ctrl-C.
    with contextlib.closing(conversation.ask(question)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print(flush=True)
    if conversation.dropped:
        print(f"[oldest messages that no longer fit: {conversation.dropped}]", file=sys.stderr)

"""Text from a model and its tokenizer: the continuation of a prompt or of messages."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...errors import InputError
from ...model import GPT
from ...model.generation import Decoder, Sampling, stream_text
from ..data.tokenizers.tokenizer import Tokenizer
from .templates import TEMPLATES, Message


def encode_prompt(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """Return the ids of a prompt, after the ids that the model expects before a text.

    Args: prompt: text to continue. None: the start of a document.
    Raises: InputError for an empty text.
    """
    if prompt is None:
        return list(tokenizer.start_tokens) or [tokenizer.end_of_text]
    if not prompt:
        raise InputError(
            "prompt: expected text, got an empty one; leave `prompt` out to start a document"
        )
    return [*tokenizer.start_tokens, *tokenizer.encode(prompt).tolist()]


def encode_question(tokenizer: Tokenizer, messages: list[Message], template: str) -> list[int]:
    """Return the ids of messages and of the words that begin the answer."""
    if template == "model":
        return tokenizer.encode_rendered(tokenizer.render_chat(messages)).tolist()
    text = TEMPLATES[template].prompt(messages)
    return [*tokenizer.start_tokens, *tokenizer.encode(text).tolist()]


def for_tokenizer(sampling: Sampling, tokenizer: Tokenizer) -> Sampling:
    """Add what the tokenizer knows: the ids that end a text, and how many ids there are."""
    stop_tokens = (*sampling.stop_tokens, *tokenizer.stop_tokens)
    return replace(sampling, stop_tokens=stop_tokens, vocab_size=tokenizer.vocab_size)


def answer_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text that follows a prompt in `tokens`, without the stop token that ended it."""
    answer = tokens[len(prompt) :]
    if answer and answer[-1] in tokenizer.stop_tokens:
        answer = answer[:-1]
    return tokenizer.decode_answer(answer)


def stream_sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    decoder: Decoder | None = None,
) -> Iterator[str]:
    """Yield the text that continues a prompt, until a stop token of the tokenizer.

    Args:
        prompt: ids, as from `encode_prompt`.
        sampling: the options, without those that `for_tokenizer` adds.
        decoder: as for `stream_text`. Its sampling is the result of `for_tokenizer`.
    """
    sampling = for_tokenizer(sampling, tokenizer)
    return stream_text(model, tokenizer, prompt, sampling, decoder=decoder)


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> str:
    """Return a prompt with its continuation, for the samples of a training run.

    Only the end of a prompt that is longer than the context is read. An empty prompt is the start
    of a document. No CUDA graph is captured, because the training may use the device.
    """
    ids = encode_prompt(tokenizer, prompt or None)[-model.config.context_tokens :]
    decoder = Decoder(model, 1, for_tokenizer(sampling, tokenizer), use_graph=False)
    return prompt + "".join(stream_sample(model, tokenizer, ids, sampling, decoder))

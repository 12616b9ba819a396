"""A model of lm-evaluation-harness (the package lm_eval, extra `eval`): --model tritium.

Importing this module registers the model. lm_eval after 0.4.13 finds it by an entry point
(setup.py). lm_eval 0.4.13 does not, so `tritium eval lm-eval` imports this module and then calls
lm_eval's own command line.

    log-likelihoods    scoring.py: contexts that several continuations share are computed once
    rolling            lm_eval's windows without overlap, as its own model for transformers has them
    generation         GPT.generate: batches of prompts of different lengths, with a KV cache
"""

from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ...errors import InputError
from ...model.generation import Sampling
from ..generation.text import answer_text, for_tokenizer
from ..machine.options import OpenOptions
from .model import OpenedModel
from .scoring import score

_AUTO_BATCH_SIZE = 16


@register_model("tritium")
class TritiumLM(TemplateLM):
    """A model that tritium can open.

    Args:
        pretrained: a run, a checkpoint, a Hugging Face folder or a GGUF file.
        tokenizer: another tokenizer than the model's own, as `from_spec` takes it.
        device, precision: as for OpenOptions. None and cuda:0, lm_eval's default also where there
            is no GPU, mean auto.
        batch_size: sequences per forward. auto: 16.
        max_batch_size: not used. lm_eval passes it.
        max_gen_toks: maximum number of new tokens, unless a task has its own.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        device: str | None = None,
        precision: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        device = "auto" if device in (None, "cuda:0") else device
        opening = OpenOptions(tokenizer=tokenizer, device=device, precision=precision)
        self._model = OpenedModel.open(Path(pretrained), opening, needs_tokenizer=True)
        self.tokenizer = self._model.needed_tokenizer()
        self._device = self._model.device
        is_auto = str(batch_size).startswith("auto")
        self.batch_size = _AUTO_BATCH_SIZE if is_auto else int(batch_size)
        self.max_gen_toks = max_gen_toks

    @property
    def max_length(self) -> int:
        """Context of the model, in tokens."""
        return self._model.gpt.config.context_tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.token_ids.get("bos_token_id")
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return f"{self.tokenizer.name}-{self.tokenizer.sha256[:12]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        tokens = self.tokenizer.encode_rendered(string).tolist()
        start = list(self.tokenizer.start_tokens)
        has_start = add_special_tokens is None and tokens[: len(start)] == start
        return tokens if add_special_tokens is False or has_start else [*start, *tokens]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood") as bar:
            scores = score(self._model.gpt, pairs, batch_size=self.batch_size, report=bar.update)
        found = [(each.log_likelihood, each.is_greedy) for each in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
            total = sum(log_likelihood for log_likelihood, _ in found)
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Requests of a batch have the same options, and contexts of similar lengths."""
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            _check_options(request.args[1])
            groups.setdefault(repr(request.args[1]), []).append(index)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for indices in groups.values():
                indices.sort(key=lambda index: -len(requests[index].args[0]))
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    texts |= zip(batch, self._generate([requests[i] for i in batch]), strict=True)
                    bar.update(len(batch))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, requests: list) -> list[str]:
        """Generate for requests that have the same options."""
        options = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        end = self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(options["until"], eos=end)
        sampling = Sampling(
            max_new_tokens=options["max_gen_toks"],
            temperature=options.get("temperature", 0.0) if options["do_sample"] else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            stop=tuple(text for text in stop if text),
            seed=options.get("seed", 0),
        )
        sampling = for_tokenizer(sampling, self.tokenizer)
        # As lm_eval does for transformers: a context that is too long loses its first tokens.
        room = max(1, self.max_length - sampling.max_new_tokens)
        prompts = [
            (self.tok_encode(request.args[0]) or [self.prefix_token_id])[-room:]
            for request in requests
        ]
        continued = self._model.gpt.generate(prompts, sampling=sampling, tokenizer=self.tokenizer)
        found = []
        for request, prompt, tokens in zip(requests, prompts, continued, strict=True):
            text = answer_text(self.tokenizer, prompt, tokens)
            text = postprocess_generated_text(text, stop, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found


def _check_options(options: dict[str, Any]) -> None:
    # transformers counts max_length with the padding, so results would depend on the batch.
    if "max_length" in options:
        raise InputError(
            "generation_kwargs: expected max_gen_toks, the maximum number of new tokens, got "
            f"max_length={options['max_length']}"
        )

"""A GPT like GPT-2 or Llama: pre-norm blocks between an embedding and a head.

    stream     h = wte[token] + wpe[position]                RoPE: h = wte[token]; sinusoidal: wpe
                                                             is a fixed table
    block      h += attention(ln_1(h))     h += mlp(ln_2(h))
    head       logits = ln_f(h) @ wte.T                      untied: ln_f(h) @ lm_head.T

Modules have the names of the published GPT-2 checkpoints. A branch is the output of attention or of
an MLP. A block returns its last branch without adding it to the stream. The next norm adds it, in
one pass over memory.

Shapes     streams and branches (B T, D), tokens (B, T): B sequences, T tokens, D = d_model,
           V = vocab_size
Source     Radford et al. 2019, "Language models are unsupervised multitask learners";
           Touvron et al. 2023, arXiv:2302.13971
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels import embedding, linear, linear_cross_entropy
from ._inputs import check_documents, check_tokens
from .choices import (
    ATTENTIONS,
    MLPS,
    NORMS,
    POSITIONS,
    RECOMPUTATIONS,
    check_attention_options,
    check_recompute,
    choose_attention,
)
from .config import DROPOUTS, AdapterOptions, GPTConfig
from .context import Branch, ForwardContext, adapter_seeds, dropout_seeds
from .generation import KVCache, Prefill, generate
from .hub import download, is_hub_name
from .init import init_weights
from .layers import Attention
from .positions import rope_tables, sinusoidal_table
from .prefix import prefix_shape
from .weights import MAX_SHARD_BYTES, load_into, open_source, write_folder


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        norm = NORMS[config.norm].module
        self.layer = layer
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLPS[config.mlp].module(config)

    def forward(
        self, branch: Branch | None, stream: Tensor, context: ForwardContext
    ) -> tuple[Branch, Tensor]:
        """Return the MLP's output, and the residual stream to which the next norm adds it."""
        y, stream = self.ln_1(branch, stream, context.branch_dropout(3 * self.layer))
        branch = self.attn(y, context, self.layer)
        y, stream = self.ln_2(branch, stream, context.branch_dropout(3 * self.layer + 2))
        return self.mlp(y, context.adapter_seeds_of(self.layer)[2:]), stream


class GPT(nn.Module):
    """A GPT with freshly initialized weights.

    Args:
        config: shape of the model.
        attention: a row of ATTENTIONS. Tokens after a prompt always use tritium's attention_decode.
        recompute: a row of RECOMPUTATIONS, the mode of activation checkpointing.
    Attributes:
        compute_dtype: dtype of the residual stream in the blocks. None: dtype of the embedding.
        adapter: the options of LoRA if add_lora changed the model, or None.
    Raises: ValueError if the attention is unknown, not installed or does not support an option of
        the model, or if the mode of activation checkpointing is unknown or does not fit the MLP.
    """

    def __init__(self, config: GPTConfig, *, attention: str = "tritium", recompute: str = "none"):
        super().__init__()
        check_recompute(recompute, config)
        self.attention = choose_attention(attention).functions
        # Without dropout: _seeds checks it, because it has an effect in training only.
        check_attention_options(attention, config.with_dropout_of(GPTConfig()))
        self.config = config
        self._attention_name = attention
        self.compute_dtype: torch.dtype | None = None
        self.adapter: AdapterOptions | None = None
        self._run_block = RECOMPUTATIONS[recompute].run_block
        self._position = POSITIONS[config.position]

        self.wte = _embedding(config.padded_vocab_size, config.d_model)
        if self._position.has_table:
            self.wpe = _embedding(config.position_rows, config.d_model)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        if RECOMPUTATIONS[recompute].in_mlp:
            for block in self.h:
                block.mlp.recompute = True
        self.ln_f = NORMS[config.norm].module(config)
        self._has_own_head = not config.tied_head
        if self._has_own_head:
            # An embedding and not a Linear: its weight stays float32, and Muon does not train it.
            self.lm_head = _embedding(config.padded_vocab_size, config.d_model)
        # Trained keys and values before each sequence: see prefix.py.
        self.prefix: nn.Parameter | None = None
        if config.prefix_tokens:
            self.prefix = nn.Parameter(torch.empty(prefix_shape(config)))
        init_weights(self, config.n_layer)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | Prefill | None = None,
        token_order: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor | None:
        """Predict the token that follows each position.

        Args:
            tokens: (B, T) int64. T plus the longest length of the cache is at most context_tokens.
            targets: (B, T) int64, the tokens to predict; -100 is ignored.
            cu_seqlens: (documents + 1,) int32, on the device of tokens. The B T tokens are packed
                documents; document i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. The first entry
                is 0, and the last is B T. A document has at most context_tokens. Each row begins a
                document, unless the attention is tritium. Documents do not attend to each other,
                and positions start at 0 in each. Default: B documents of T tokens.
            cache: keys and values of earlier tokens. The forward adds those of `tokens`. With a
                Prefill, the forward only fills the cache and returns None.
            token_order: (B T,) integers, a stable sort of the flattened tokens, for the gradient of
                the embedding. Default: the backward sorts them.
            dropout_seed: () int64 on the device of tokens. Elements are dropped only in training
                mode and without a cache. Default: drawn from PyTorch's generator.
        Returns: logits (B, T, V); with targets the mean cross-entropy, () float32, in nats; with a
            Prefill None.
        Raises: ValueError for more tokens than the context holds, or for documents and a cache; on
            the CPU also ValueError for other values of cu_seqlens than those above, and IndexError
            for a token outside the vocabulary.
        """
        y, head = self.hidden(
            tokens,
            cu_seqlens=cu_seqlens,
            cache=cache,
            token_order=token_order,
            dropout_seed=dropout_seed,
        )
        if y is None:
            return None
        if targets is None:
            return self.logits(y, head, cache).view(*tokens.shape, self.config.vocab_size)
        return self.losses(y, head, targets.flatten(), reduction="mean")

    def hidden(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | Prefill | None = None,
        token_order: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Compute the input of the head. `losses` and `logits` take any rows of it.

        Args: as for `forward`.
        Returns: y (B T, D), None with a Prefill; and the weight of the head.
        """
        config = self.config
        B, T = tokens.shape
        self._check(T, cu_seqlens, cache)
        check_tokens(tokens, config.vocab_size)
        if cu_seqlens is not None:
            spans_rows = ATTENTIONS[self._attention_name].spans_rows
            check_documents(cu_seqlens, (B, T), config.context_tokens, spans_rows)

        # embedding, and the weight of the head
        position = _positions(tokens, cu_seqlens, cache, config.prefix_tokens)
        is_plain = position.ndim == 1  # positions 0 ... T - 1 in each sequence
        seeds, of_adapters = None, None
        if cache is None and self.training and self.has_dropout:
            seeds, of_adapters = self._seeds(dropout_seed, tokens.device)
        stream, head = self._embed(tokens, None if is_plain else position, token_order, seeds)
        rope = None
        if self._position.rotates:
            rope = rope_tables(position, config.head_size, config.rope_base)

        # blocks
        branch = None
        dropout = (config.dropout, config.attention_dropout, seeds)
        context = ForwardContext(
            (B, T), cu_seqlens, rope, cache, self.attention, *dropout, adapter_seeds=of_adapters
        )
        if self.prefix is not None and (cache is None or cache.is_prefill):
            context = context._replace(prefix=self.prefix)

        for block in self.h:
            branch, stream = self._run_block(block, branch, stream, context)
        if cache is not None:
            cache.advance(T)
            if cache.is_prefill:
                return None, head

        # the last norm
        y, _ = self.ln_f(branch, stream, context.branch_dropout(3 * config.n_layer))
        return y, head

    def losses(
        self, y: Tensor, head: Tensor, targets: Tensor, *, reduction: str = "none"
    ) -> Tensor:
        """Return the cross-entropy of each row of y (N, D), (N,) float32, in nats.

        Args:
            y, head: as `hidden` returns them. Rows of y may be left out.
            targets: (N,) int64; the loss of -100 is 0.
            reduction: as for linear_cross_entropy.
        """
        options = {"softcap": self.config.head_softcap, "vocab_size": self.config.vocab_size}
        return linear_cross_entropy(y, head, targets, reduction=reduction, **options)

    def logits(self, y: Tensor, head: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits of y (N, D), (N, vocab_size), without those of the padding rows."""
        weight = head[: self.config.vocab_size]
        weight = weight.to(y.dtype) if cache is None else cache.cast_once(weight, y.dtype)
        logits = linear(y, weight)
        softcap = self.config.head_softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    @property
    def has_dropout(self) -> bool:
        """Whether elements are dropped in training."""
        return self._has_own_dropout or self._has_adapter_dropout

    @property
    def _has_own_dropout(self) -> bool:
        return any(getattr(self.config, name) for name in DROPOUTS)

    @property
    def _has_adapter_dropout(self) -> bool:
        return self.adapter is not None and self.adapter.lora_dropout > 0

    def _seeds(
        self, seed: Tensor | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the seeds of all dropout masks: the model's own, and LoRA's. None: no dropout."""
        check_attention_options(self._attention_name, self.config)
        if seed is None:
            seed = torch.randint(2**62, (), device=device)
        n_layer = self.config.n_layer
        own = dropout_seeds(seed, n_layer) if self._has_own_dropout else None
        return own, adapter_seeds(seed, n_layer) if self._has_adapter_dropout else None

    def _embed(
        self,
        tokens: Tensor,
        position: Tensor | None,
        order: Tensor | None,
        seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream (B T, D) before the blocks, and the weight of the head.

        position: as in `embedding`. None: 0 ... T - 1 in each sequence.
        """
        table = None
        if self._position.has_table:
            table = self.wpe.weight
        elif self._position.is_sinusoidal:
            rows = tokens.shape[1] if position is None else self.config.position_rows
            table = sinusoidal_table(rows, self.config.d_model, tokens.device)
            table = table.to(self.wte.weight.dtype)
        options = {
            "position": None if table is None else position,
            "position_weight": table,
            "order": order,
            "dtype": self.compute_dtype,
        }
        if seeds is not None and self.config.embedding_dropout:
            options |= {"dropout_p": self.config.embedding_dropout, "seed": seeds[0, 0]}
        if self._has_own_head:
            stream = embedding(tokens, self.wte.weight, **options)
            return stream.flatten(0, 1), self.lm_head.weight
        stream, head = embedding(tokens, self.wte.weight, **options, return_weight=True)
        return stream.flatten(0, 1), head

    def _check(self, T: int, cu_seqlens: Tensor | None, cache: KVCache | Prefill | None) -> None:
        length = T if cache is None else cache.longest + T
        if length > self.config.context_tokens:
            raise ValueError(
                f"GPT: context_tokens is {self.config.context_tokens}, got {length} tokens; "
                "shorten the input"
            )
        if cu_seqlens is not None and self.prefix is not None:
            raise ValueError(
                "GPT: expected no cu_seqlens in a model with a prefix, got packed documents"
            )
        if cu_seqlens is not None and cache is not None:
            raise ValueError(
                "GPT: expected cu_seqlens or a cache, got both; "
                "generate from one document at a time"
            )

    generate = generate

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "tritium",
        recompute: str = "none",
    ) -> "GPT":
        """Read a published model of a family that _families.py lists.

        Args:
            path: a Hugging Face folder, a GGUF file, a checkpoint of nanoGPT, or owner/name on
                huggingface.co. Quantized values of a GGUF file become float32.
            revision: branch, tag or commit of owner/name.
            dtype: of the weights. Default: as in the file.
            attention, recompute: as for GPT.
        Returns: the model on the CPU, in evaluation mode, in which nothing is dropped.
        Raises: InputError if the folder is not a model that tritium has, or is damaged.
        """
        source = open_source(download(path, revision) if is_hub_name(str(path)) else Path(path))
        with torch.device("meta"):
            model = cls(source.config, attention=attention, recompute=recompute)
        load_into(model, source)
        model.eval()
        return model if dtype is None else model.to(dtype)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        end_of_text: int | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write the model as a folder that transformers opens: the whole folder or nothing.

        Args:
            folder: must not exist, or be empty.
            end_of_text: id of the token between documents, for generation.
            max_shard_bytes: largest size of a file of weights.
        Raises: InputError if the folder is in use, or if transformers has no such model.
        """
        write_folder(
            Path(folder),
            self.state_dict(),
            self.config,
            token_ids={"bos_token_id": end_of_text, "eos_token_id": end_of_text},
            max_shard_bytes=max_shard_bytes,
        )


def _positions(
    tokens: Tensor, cu_seqlens: Tensor | None, cache: KVCache | Prefill | None, prefix_tokens: int
) -> Tensor:
    """Return 0 ... T - 1, or (B, T), the position of each token in its document or sequence."""
    B, T = tokens.shape
    if prefix_tokens and (cache is None or cache.is_prefill):
        return torch.arange(prefix_tokens, prefix_tokens + T, device=tokens.device).repeat(B, 1)
    if cache is not None:
        return cache.positions(T)
    if cu_seqlens is None:
        return torch.arange(T, device=tokens.device)
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=B * T)
    return (torch.arange(B * T, device=tokens.device) - starts).view(B, T)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding without initial values; init_weights fills it."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)

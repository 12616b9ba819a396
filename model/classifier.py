"""A GPT that classifies texts: the head reads the last token that is not padding.

    logits     score @ ln_f(h)[last]                         no bias
    loss       mean_i weight_i cross_entropy(logits_i, label_i)

Texts are rows with padding after their last token, or packed end to end without padding. Attention
is causal, so the padding does not change the logits. A Hugging Face folder holds the model as
GPT2ForSequenceClassification, LlamaForSequenceClassification, and so on.

Shapes     tokens (B, T); N texts; logits (N, C) for C labels
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import cross_entropy, linear
from .config import GPTConfig
from .gpt import GPT
from .init import STANDARD_DEVIATION
from .weights import MAX_SHARD_BYTES, load_into, open_source, write_folder


class GPTClassifier(GPT):
    """A GPT with a head over labels in place of the head over the vocabulary.

    Its weights have the names of a GPT, and `score.weight` (C, D).

    Args:
        config: shape of the GPT. The classifier has no lm_head, whatever `tied_head` is.
        labels: names of the labels, in the order of the logits.
        attention, recompute: as for GPT.
    Raises: ValueError as GPT, or for fewer than two labels.
    """

    def __init__(
        self,
        config: GPTConfig,
        labels: Sequence[str],
        *,
        attention: str = "tritium",
        recompute: str = "none",
    ):
        if len(labels) < 2:
            raise ValueError(f"GPTClassifier: expected two labels or more, got {len(labels)}")
        without_head = dataclasses.replace(config, tied_head=True)
        super().__init__(without_head, attention=attention, recompute=recompute)
        self.config = config
        self.labels = tuple(labels)
        # An embedding and not a Linear: its weight stays float32, and Muon does not train it.
        score = torch.empty(len(labels), config.d_model).normal_(std=STANDARD_DEVIATION)
        self.score = nn.Embedding.from_pretrained(score, freeze=False)

    def forward(
        self,
        tokens: Tensor,
        last: Tensor,
        label: Tensor | None = None,
        *,
        loss_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_order: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Classify texts, or compute their loss.

        Args:
            tokens: (B, T) int64. The tokens after the last one of a text are padding: any ids.
            last: (N,) int64 in [0, B T), the place of each text's last token in the flattened
                tokens.
            label: (N,) int64 in [0, C).
            loss_weight: (N,) float32, the weight of each text in the mean. Default: 1.
            cu_seqlens: as for GPT; each text is a document. Default: each row is a text.
            token_order, dropout_seed: as for GPT.
        Returns: logits (N, C) float32; with `label` the weighted mean of the cross-entropy,
            () float32, in nats. The sum is divided by N, not by the sum of the weights.
        Raises: ValueError for more tokens than the context holds.
        """
        options = {"cu_seqlens": cu_seqlens, "token_order": token_order}
        y, _ = self.hidden(tokens, **options, dropout_seed=dropout_seed)
        logits = linear(y[last].float(), self.score.weight)
        if label is None:
            return logits
        losses = cross_entropy(logits, label, reduction="none")
        return (losses if loss_weight is None else losses * loss_weight).mean()

    def freeze(self, trained_blocks: int | None) -> None:
        """Train only some weights. The others have no gradient and no optimizer state.

        Args: trained_blocks: number of last blocks to train, with the final norm and the head.
            0: only the head. None: all weights.
        Raises: ValueError if the model has fewer blocks.
        """
        n_layer = self.config.n_layer
        if trained_blocks is not None and not 0 <= trained_blocks <= n_layer:
            raise ValueError(
                f"trained_blocks: expected 0 to {n_layer}, the blocks of the model, "
                f"got {trained_blocks}"
            )
        self.requires_grad_(trained_blocks is None)
        self.score.requires_grad_(True)
        if trained_blocks:
            self.ln_f.requires_grad_(True)
            for block in self.h[n_layer - trained_blocks :]:
                block.requires_grad_(True)

    @classmethod
    def from_gpt(
        cls,
        model: GPT,
        labels: Sequence[str],
        *,
        attention: str = "tritium",
        recompute: str = "none",
    ) -> "GPTClassifier":
        """Return a classifier with the weights of a GPT, and a new head.

        Args:
            model: the GPT. The classifier takes its tensors, except lm_head.
            labels, attention, recompute: as for GPTClassifier.
        """
        with torch.device("meta"):
            classifier = cls(model.config, labels, attention=attention, recompute=recompute)
        weights = model.state_dict()
        weights.pop("lm_head.weight", None)
        like = weights["wte.weight"]
        score = torch.empty(classifier.score.weight.shape, dtype=like.dtype, device=like.device)
        weights["score.weight"] = score.normal_(std=STANDARD_DEVIATION)
        classifier.load_state_dict(weights, assign=True)
        return classifier.train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        attention: str = "tritium",
        recompute: str = "none",
    ) -> "GPTClassifier":
        """Read a Hugging Face folder, such as one with a GPT2ForSequenceClassification.

        Args:
            path: the folder.
            dtype: of the weights. Default: as in the folder.
            attention, recompute: as for GPT.
        Returns: the model on the CPU, in evaluation mode.
        Raises: InputError if the folder is not a classifier that tritium has, or is damaged.
        """
        source = open_source(Path(path))
        if not source.labels:
            raise InputError(
                f"{source.path}: expected a model that classifies texts, got a language model; "
                "`tritium finetune classify` makes one"
            )
        with torch.device("meta"):
            model = cls(source.config, source.labels, attention=attention, recompute=recompute)
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
            end_of_text: id of the token between documents. It is also the padding: transformers
                takes the last token that is not padding as the last token of a text.
            max_shard_bytes: largest size of a file of weights.
        Raises: InputError if the folder is in use, or if transformers has no such model.
        """
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_folder(
            Path(folder),
            self.state_dict(),
            self.config,
            token_ids=dict.fromkeys(names, end_of_text),
            labels=self.labels,
            max_shard_bytes=max_shard_bytes,
        )

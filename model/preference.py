"""Direct preference optimization (DPO): train a GPT to prefer one answer to another.

    pair      a prompt, a chosen answer c and a rejected answer r
    log p     of an answer after its prompt: the sum over its tokens; with length_normalize the mean
    reward    beta (log p - log p_ref), where p_ref is the model before the first step
    margin    m = reward of c - reward of r
    loss      mean over pairs of -(1 - s) log sigmoid(m) - s log sigmoid(-m), s = label_smoothing

Before the first step all margins are 0, so the loss is log 2. p_ref is an input of the loss: no
second model is in memory. linear_cross_entropy computes log p, so no tensor (2 R, T, V) exists.

Shapes     tokens, targets (2 R, T): R chosen answers after their prompts, then R rejected ones
Source     Rafailov et al. 2023, arXiv:2305.18290; label smoothing: Mitchell 2023,
           "A note on DPO with noisy preferences"
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import GPTConfig
from .gpt import GPT

_IGNORED = -100


class PreferenceModel(GPT):
    """A GPT with the loss of DPO. Without `reference` its forward is a GPT's.

    Args:
        config, attention, recompute: as for GPT.
        beta: scale of rewards. Smaller values allow more distance from p_ref.
        label_smoothing: probability that chosen and rejected are swapped in the data.
        length_normalize: whether log p is a mean over tokens.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalize: bool = False,
        **options: str,
    ):
        super().__init__(config, **options)
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.length_normalize = length_normalize

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reference: Tensor | None = None,
        reduction: str = "mean",
        **options: Tensor,
    ) -> Tensor | None:
        """Return the loss of pairs of answers.

        Args:
            tokens: (2 R, T) int64.
            targets: (2 R, T) int64, -100 except at the tokens of answers.
            reference: (R,) float32, log p_ref of the chosen minus that of the rejected answers.
                None: do what GPT does.
            reduction: "mean": the loss, () float32; "none": the margins, (R,) float32.
            options: of GPT.forward.
        """
        if reference is None:
            return super().forward(tokens, targets, **options)
        chosen, rejected = self.answer_logps(tokens, targets, **options).chunk(2)
        margin = self.beta * (chosen - rejected - reference)
        if reduction == "none":
            return margin
        return dpo_loss(margin, self.label_smoothing).mean()

    def answer_logps(self, tokens: Tensor, targets: Tensor, **options: Tensor) -> Tensor:
        """Return log p of the targets of each row, (rows,) float32."""
        y, head = self.hidden(tokens, **options)
        logps = -self.losses(y, head, targets.flatten()).view(targets.shape).sum(1)
        if self.length_normalize:
            logps = logps / (targets != _IGNORED).sum(1).clamp(min=1)
        return logps


def dpo_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each pair from its margin."""
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-margin)
    return loss


def as_preference_model(model: GPT, **options: float | str | bool) -> PreferenceModel:
    """Return a PreferenceModel with the weights of a GPT, which it shares, and its mode.

    Args: options: of PreferenceModel.
    """
    with torch.device("meta"):
        result = PreferenceModel(model.config, **options)
    result.load_state_dict(model.state_dict(), assign=True)
    result.compute_dtype = model.compute_dtype
    return result.train(model.training)

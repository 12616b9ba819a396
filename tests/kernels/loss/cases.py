"""What the tests of cross_entropy and linear_cross_entropy share."""

import torch
import torch.nn.functional as F


def torch_cross_entropy(
    logits,
    target,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=0.0,
    reduction="mean",
):
    """The same by PyTorch, in float32 at least, as autocast would."""
    s = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    counted = target != ignore_index
    loss = F.cross_entropy(
        s, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    loss = torch.where(counted, loss + z_loss * s.logsumexp(-1) ** 2, 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counted.sum()}[reduction]

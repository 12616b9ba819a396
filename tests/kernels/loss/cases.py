"""Cases that the tests of cross_entropy and linear_cross_entropy share."""

import torch
import torch.nn.functional as F

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
ALL_OPTIONS = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {**ALL_OPTIONS, "ignore_index": 1},
]
# Arguments that both losses reject, for two rows of logits in float32, and the message.
BAD_ARGUMENTS = [
    ({"target": torch.ones(3, dtype=torch.long)}, r"target must have shape \(2,\) .*, got \(3,\)"),
    ({"target": torch.ones(2)}, r"target must be int64 or int32 class indices, got torch.float32"),
    ({"target": torch.zeros(2, dtype=torch.long, device="meta")}, r"target must be on cpu .* meta"),
    ({"label_smoothing": 1.1}, r"label_smoothing must be from 0 to 1, got 1.1"),
    ({"label_smoothing": -0.1}, r"label_smoothing must be .*, got -0.1"),
    ({"z_loss": -1.0}, r"z_loss must be from 0 \(no z-loss\) to 1e\+18, got -1.0"),
    ({"softcap": -30.0}, r"softcap must be 0 \(no softcap\) or from 1e-18 to 1e\+18, got -30.0"),
    ({"softcap": float("inf")}, r"softcap must be .*, got inf"),
    ({"softcap": 1e39}, r"softcap must be .*, got 1e\+39"),
    ({"softcap": "1"}, r"softcap must be float \| None, got '1'"),
    ({"ignore_index": 1.5}, r"ignore_index must be int, got 1.5"),
    (
        {"ignore_index": 2**40, "target": torch.zeros(2, dtype=torch.int32)},
        r"ignore_index must fit in the target's dtype torch.int32, got 1099511627776; use int64",
    ),
    ({"reduction": "means"}, "unknown reduction 'means'; did you mean 'mean'"),
]  # fmt: skip


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
    """The loss by PyTorch, in float32 or wider, as under autocast."""
    s = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    has_loss = target != ignore_index
    loss = F.cross_entropy(
        s, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    loss = torch.where(has_loss, loss + z_loss * s.logsumexp(-1) ** 2, 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / has_loss.sum()}[reduction]


def given_reduction(options, reduction, incoming):
    """Arguments of run(): the options with a reduction, and an incoming gradient for "none"."""
    incoming = incoming if reduction == "none" else None
    return {**options, "reduction": reduction, "incoming": incoming}


def torch_rows(logits, target, softcap=0.0):
    """Return lse of each row, 0 if it is ignored, and the number of right predictions."""
    s = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    has_loss = target != -100
    at_target = s.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    correct = (at_target == s.amax(-1)) & has_loss
    return torch.where(has_loss, s.logsumexp(-1), 0.0), correct.sum()

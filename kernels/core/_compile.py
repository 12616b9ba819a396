"""How torch.compile treats the implementations of operators."""

import functools
import sys
from collections.abc import Callable, Sequence

import torch


def opaque(function: Callable) -> Callable:
    """Keep torch.compile from compiling the inside of an implementation that runs eagerly."""
    disabled = None

    @functools.wraps(function)
    def run(*args):
        nonlocal disabled
        if disabled is None:
            # Disable at the first call, because this imports Dynamo.
            disabled = torch.compiler.disable(function)
        return disabled(*args)

    return run


def with_short_messages(fake: Callable) -> Callable:
    """Keep Inductor of PyTorch before 2.13 from formatting the arguments of operators.

    It does so for a log message, even if nobody reads the log. The text doubles with each custom
    operator before this one, so compilation of a model with 12 blocks would never end.
    """
    if torch.__version__ >= (2, 13):
        return fake

    @functools.wraps(fake)
    def run(*args):
        # Inductor is imported before it traces with fake tensors. Other backends do not need it.
        if issues := sys.modules.get("torch._inductor.exc"):
            issues.OperatorIssue.operator_str = staticmethod(_name_operator)
        return fake(*args)

    return run


def _name_operator(target: object, args: Sequence, kwargs: dict) -> str:
    return f"  target: {target}"

"""tritium plan: whether a run fits, how long it takes, what it costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ....errors import InputError
from ...machine.gpus import CEILINGS
from ...machine.options import PlanOptions
from ...recipes import RECIPES, recipe
from ..cli import parse

_DESCRIPTION = f"""Estimate what a run needs: memory, time and price.


recipes: {", ".join(RECIPES)}

GPUs: {", ".join(CEILINGS)}"""

_EPOCHS_LINE = 4  # after the line of the step


@dataclass(frozen=True, kw_only=True)
class PlanFlags(PlanOptions):
    """Options of `tritium plan`."""

    recipe: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RECIPE")]]
    """Recipe to plan for."""
    price: float | None = None
    """Price per GPU per hour, in any currency. None: no price."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium plan`."""
    options = parse(PlanFlags, argv, prog="tritium plan", description=_DESCRIPTION)
    if options.price is not None and not 0 <= options.price < math.inf:
        raise InputError(f"price: expected 0 or more, and finite, got {options.price}")
    from ....model.cost import adapter_elements
    from ...data.epochs import describe_epochs, estimate_corpus_tokens
    from ...plan import make_plan
    from ._plan_text import describe

    plan = make_plan(options)
    lines = describe(plan, options.recipe, options.price)
    config = recipe(options.recipe)
    corpus_tokens = estimate_corpus_tokens(config)
    if corpus_tokens:
        epochs = describe_epochs(plan.tokens, corpus_tokens, config.model.dropout)
        has_adapter = adapter_elements(plan.model, plan.adapter) > 0
        lines.insert(_EPOCHS_LINE + has_adapter, f"data       about {epochs}")
    print("\n".join(lines))
    return 0

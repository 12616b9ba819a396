"""Windows over a sequence of tokens, and the two ways to count their losses.

    C tokens of context, stride S, N tokens. Token 0 is context only.

    exact          inputs of window i: tokens [iS, iS + C)
                   targets of window 0: tokens 1 ... C
                   targets of window i: the tokens after those of window i - 1, up to iS + C
                   weight: the number of targets
    huggingface    tokens of window i: [iS, iS + C), so its inputs are one token fewer
                   targets of window i: its tokens that no window before it has
                   weight: the number of those tokens, minus 1

`exact` predicts each token except the first once. A prediction uses C - S + 1 tokens of context or
more, or all tokens before it. A smaller stride gives more context and takes more time.

`huggingface` is the counting of transformers' guide "Perplexity of fixed-length models". The mean
loss of a window has the weight "number of new tokens - 1". With S = C the first token of each
window is never a target. With S < C each window after the first has too small a weight.

The result of both is sum_i(weight_i * mean_i) / sum_i(weight_i) over the mean losses of windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...errors import InputError


@dataclass(frozen=True)
class Window:
    """A window over one sequence.

    Attributes:
        begin, end: the inputs are tokens [begin, end).
        first: the targets are the tokens after inputs [first, end).
        weight: of the mean loss of the targets.
    """

    begin: int
    end: int
    first: int
    weight: int

    @property
    def num_targets(self) -> int:
        """Number of targets, 1 or more."""
        return self.end - self.first


def exact_windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows whose targets are tokens 1 ... length - 1, each once."""
    done = 0
    begin = 0
    while done < length - 1:
        end = min(begin + context, length - 1)
        yield Window(begin, end, done, end - done)
        done = end
        begin += stride


def huggingface_windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows of transformers' guide. Windows without a target are left out."""
    done = 0
    begin = 0
    while done < length:
        end = min(begin + context, length)
        first = max(done, begin + 1) - 1
        if first < end - 1:
            yield Window(begin, end - 1, first, end - done - 1)
        done = end
        begin += stride


# Values of the option `counting`.
COUNTINGS: dict[str, Callable[[int, int, int], Iterator[Window]]] = {
    "exact": exact_windows,
    "huggingface": huggingface_windows,
}


def check_sizes(context: int, stride: int, longest: int) -> None:
    """Raise InputError unless 1 <= stride <= context <= longest, the context of the model."""
    if not 1 <= context <= longest:
        raise InputError(
            f"context_tokens: expected 1 to {longest}, the context of the model, got {context}"
        )
    if not 1 <= stride <= context:
        raise InputError(f"stride: expected 1 to {context}, the context, got {stride}")

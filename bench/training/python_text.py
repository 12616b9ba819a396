"""Whether a text begins like Python: a measure of the samples of a small model."""

import codeop
import warnings


def is_broken(text: str) -> bool:
    """Return whether the first three lines of a text cannot be the start of Python code.

    Empty lines do not count. If the first line is indented, the lines are checked inside functions.
    """
    first = [line for line in text.expandtabs().splitlines() if line.strip()][:3]
    if not first:
        return True
    indentation = len(first[0]) - len(first[0].lstrip())
    around = [f"{' ' * column}def f():" for column in range(0, indentation, 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # such as "\d" in a string
        try:
            codeop.compile_command("\n".join([*around, *first]), symbol="exec")
        except (SyntaxError, ValueError, OverflowError):
            return True
    return False

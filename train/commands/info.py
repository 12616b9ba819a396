"""tritium info: versions, the device and its limits, caches."""

from collections.abc import Sequence

from ...errors import InputError

_HELP = """usage: tritium info

Print versions, the device and its limits, and the folders of caches."""


def main(argv: Sequence[str]) -> int:
    """Run `tritium info`."""
    if argv and argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    if argv:
        raise InputError(f"info: expected no options, got {argv[0]!r}")
    from ._machine import describe_machine

    for name, value in describe_machine().items():
        print(f"{name:15} {value}")
    return 0

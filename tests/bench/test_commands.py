import pytest

from tritium.bench.commands import COMMANDS, bench
from tritium.errors import InputError

pytestmark = pytest.mark.plain


def test_help_names_every_command(capsys):
    assert bench([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_unknown_command_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown command 'kernel'; did you mean 'kernels'"):
        bench(["kernel"])


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        bench([command, "--help"])
    assert not stop.value.code
    assert f"tritium bench {command}" in capsys.readouterr().out

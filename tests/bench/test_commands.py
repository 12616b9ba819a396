import pytest

from tritium.bench import record
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


@pytest.mark.parametrize("command", ["pages", "pictures", "report"])
def test_commands_that_write_into_a_checkout_need_one(command, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    with pytest.raises(InputError, match=f"{command}.*: expected a checkout of tritium, got an"):
        bench([command])

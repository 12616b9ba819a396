from pathlib import Path

import pytest

from tritium.train.storage import cache as module
from tritium.train.storage.cache import cache_dir

pytestmark = pytest.mark.plain


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"TRITIUM_HOME": "/t"}, "/t"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/tritium"),
        ("linux", {}, "/h/.cache/tritium"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/h/Library/Caches/tritium"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/tritium"),
        ("win32", {}, "/h/AppData/Local/tritium"),
    ],
)
def test_cache_dir_per_platform(monkeypatch, platform, environment, expected):
    for name in ("TRITIUM_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/h"))
    assert cache_dir() == Path(expected)

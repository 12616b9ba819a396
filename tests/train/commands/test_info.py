import pytest

pytestmark = pytest.mark.plain


def test_info_shows_versions_device_and_caches(tritium, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "elsewhere"))
    status, out, _ = tritium("info")
    assert status == 0
    names = ("tritium", "torch", "triton", "device", "ceilings", "default recipe", "compile cache")
    for name in (*names, str(tmp_path / "elsewhere")):
        assert name in out


def test_info_has_no_options(error_of, tritium):
    assert "expected no options, got '--all'" in error_of("info", "--all")
    assert tritium("info", "--help")[1].startswith("usage: tritium info")

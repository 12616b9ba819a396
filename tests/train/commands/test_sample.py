import pytest

pytestmark = pytest.mark.plain


def test_same_seed_gives_the_same_text(tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    words = ("sample", tmp_path / "run", "--prompt", "the quick", "--max-new-tokens", 8)
    status, out, err = tritium(*words, "--seed", 3)
    assert status == 0, err
    assert out.startswith("the quick")
    assert tritium(*words, "--seed", 3)[1] == out
    assert tritium(*words, "--seed", 4)[1] != out


def test_bad_options_and_damaged_runs_are_one_line(error_of, tritium, tiny, tmp_path):
    assert "expected the folder of a run" in error_of("sample", tmp_path / "nowhere")
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "run"
    line = error_of("sample", run, "--temperature", "-1")
    assert "temperature must be 0 or more and finite" in line
    assert "top_p must be in (0, 1]" in error_of("sample", run, "--top-p", "2")
    assert "tritium: --seed: expected a number" in error_of("sample", run, "--seed", "-1")
    file = run / "checkpoints" / "step-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors: damaged" in error_of("sample", run)

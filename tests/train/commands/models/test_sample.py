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


def test_stop_ends_the_text_and_is_not_written(tritium, tiny, tmp_path):
    assert tritium(*tiny)[0] == 0
    words = ("sample", tmp_path / "run", "--prompt", "the", "--temperature", "0")
    words = (*words, "--repetition-penalty", "1.2", "--max-new-tokens", "30")
    text = tritium(*words)[1].removeprefix("the").removesuffix("\n")
    stops = (text[8:10], text[5:7])
    status, out, err = tritium(*words, "--stop", stops[0], "--stop", stops[1])
    assert (status, err) == (0, "")
    assert out == f"the{text[: min(map(text.find, stops))]}\n"


def test_bad_options_and_damaged_runs_are_one_line(error_of, tritium, tiny, tmp_path):
    assert "expected a run, a checkpoint" in error_of("sample", tmp_path / "nowhere")
    assert tritium(*tiny)[0] == 0
    run = tmp_path / "run"
    expected = {
        ("--temperature", "-1"): "--temperature: expected 0 or more and finite, got -1.0",
        ("--top-p", "2"): "--top-p: expected in (0, 1], got 2.0",
        ("--top-k", "0"): "--top-k: expected at least 1, got 0",
        ("--min-p", "-0.1"): "--min-p: expected in [0, 1], got -0.1",
        ("--repetition-penalty", "0"): "--repetition-penalty: expected positive and finite",
        ("--seed", "-1"): "--seed: expected from 0 to 2**63 - 1, got -1",
        ("--stop", ""): "--stop: expected texts that are not empty",
        ("--prompt", ""): "--prompt: expected text, got an empty one; leave --prompt out",
        ("--prompt", "x" * 17): "--prompt: expected at most 16 tokens, the context of the model",
    }
    for words, message in expected.items():
        assert f"tritium: {message}" in error_of("sample", run, *words)
    file = run / "checkpoints" / "step-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors: damaged" in error_of("sample", run)

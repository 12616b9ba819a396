import json
import math

import pytest

from tritium.errors import InputError
from tritium.train.eval.choice_formats import METRICS, Example, read_examples
from tritium.train.eval.scoring import Score

pytestmark = pytest.mark.plain
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is using wrap [title] Next.", "is ripping level tiles off."],
    "label": 1,
}


def read(tmp_path, *records, name: str = "auto"):
    file = tmp_path / "f.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return read_examples(file, name)


def test_hellaswag_is_read_as_llm_c_and_as_lm_eval_read_it(tmp_path):
    as_text = HELLASWAG | {"label": "0"}  # as in Hugging Face's copy
    assert read(tmp_path, HELLASWAG, as_text) == (
        "hellaswag",
        [
            Example(
                "A man is sitting on a roof. he",
                (" is using wrap [title] Next.", " is ripping level tiles off."),
                label,
            )
            for label in (1, 0)
        ],
    )
    assert read(tmp_path, HELLASWAG, name="hellaswag-lm-eval")[1] == [
        Example(
            "Roof shingle removal: A man is sitting on a roof. He",
            (" is using wrap. Next.", " is ripping level tiles off."),
            1,
        )
    ]


def test_spaces_at_the_end_of_a_context_move_to_the_choice_as_in_lm_eval(tmp_path):
    marked = HELLASWAG | {"ctx_a": "[header] How [title] Look up [step]", "ctx_b": "[substeps]"}
    marked["endings"] = ["[step] Look.", "Ask."]
    assert read(tmp_path, marked, name="hellaswag-lm-eval")[1] == [
        Example("Roof shingle removal: How. Look up", ("  Look.", " Ask."), 1, " ")
    ]
    # llm.c and build-nanogpt encode the context as it is.
    spaced = HELLASWAG | {"ctx": "He is "}
    assert read(tmp_path, spaced)[1][0].context == "He is "
    found = read(tmp_path, {"text": "to the \n moon"}, {"text": "to the  moon"})
    assert found == (
        "lambada",
        [Example("to the", (" moon",), 0, " \n"), Example("to the", (" moon",), 0, " ")],
    )


def test_lambada_predicts_the_last_word_and_plain_choices_stay_as_they_are(tmp_path):
    found = read(tmp_path, {"text": 'he said "to the moon'})
    assert found == ("lambada", [Example('he said "to the', (" moon",), 0)])
    found = read(tmp_path, {"context": "2 + 2 =", "choices": [" 4", "5"], "label": 0})
    assert found == ("plain", [Example("2 + 2 =", (" 4", "5"), 0)])


def test_accuracies_by_hand():
    example = Example("context", (" ab", " abcdefgh", " abcd"), 0)
    # log-likelihoods        sum     per token   per character
    #  ab                   -2.0         -2.0          -1.0
    #  abcdefgh             -4.0         -1.0          -0.5
    #  abcd                 -1.8         -1.8          -0.45
    scores = [Score(-2.0, 1, False), Score(-4.0, 4, False), Score(-1.8, 1, False)]
    best = {"accuracy_sum": 2, "accuracy_per_token": 1, "accuracy_per_character": 2}
    for name, choice in best.items():
        for label in range(3):
            examples = [Example("", example.choices, label), Example("", example.choices, 0)]
            assert METRICS[name](examples, [scores, scores]) == (label == choice) / 2
    # The character count leaves out one space: with it, " ab" would win over " a". An ending can
    # begin with a space itself.
    for choices, sums in (((" ab", " a"), (-2.2, -1.0)), ((" a", "  a"), (-1.0, -1.1))):
        short = Example("", choices, 1, space="  ")
        scores = [Score(each, 1, False) for each in sums]
        assert METRICS["accuracy_per_character"]([short], [scores]) == 1


def test_last_word_by_hand():
    scores = [[Score(-1.0, 1, True)], [Score(-2.5, 2, False)], [Score(-2.5, 2, True)]]
    examples = [Example("a", (" b",), 0)] * 3
    assert METRICS["last_word_accuracy"](examples, scores) == pytest.approx(2 / 3)
    assert METRICS["last_word_perplexity"](examples, scores) == pytest.approx(math.exp(2))


def test_bad_lines_raise_with_file_and_line(tmp_path):
    good = {"context": "a", "choices": [" b", " c"], "label": 0}

    def error(bad: dict | str, name: str = "auto") -> str:
        file = tmp_path / "f.jsonl"
        text = bad if isinstance(bad, str) else json.dumps(bad)
        file.write_text(f"{json.dumps(good)}\n\n{text}\n")
        with pytest.raises(InputError) as caught:
            read_examples(file, name)
        return str(caught.value)

    assert "f.jsonl:3: expected a JSON object, got" in error("{")
    assert "f.jsonl:3: expected a JSON object, got" in error("[1]")
    assert "f.jsonl:3: label: expected 0 to 1, got 2" in error(good | {"label": 2})
    for label in (-1, True, "x", None, 0.0):
        assert f"label: expected 0 to 1, got {label!r}" in error(good | {"label": label})
    assert "choices: expected text in choice 1, got ' '" in error(good | {"choices": ["a", " "]})
    assert "choices: expected two texts or more, got ['a']" in error(good | {"choices": ["a"]})
    assert "context: expected text, got ''" in error(good | {"context": ""})
    assert "as plain has, found no label" in error({"context": "a", "choices": ["b", "c"]})
    assert "f.jsonl:1: expected ctx, endings, label" in error(good, "hellaswag")
    file = tmp_path / "g.jsonl"
    file.write_text('{"question": "a"}')
    with pytest.raises(InputError, match=r"g.jsonl:1: expected the keys of a format"):
        read_examples(file)
    for text in ("word", "  word", "word "):
        file.write_text(json.dumps({"text": text}))
        with pytest.raises(InputError, match="text: expected two words or more"):
            read_examples(file)

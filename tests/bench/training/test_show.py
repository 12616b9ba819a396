import copy

import pytest

from tritium.bench.training.show import render

pytestmark = pytest.mark.plain

ROW = {
    "kind": "tritium",
    "compiled": False,
    "tokens_per_second": 1234.5,
    "step_seconds": {"median": 0.1, "p10": 0.09, "p90": 0.2},
    "mfu": None,
    "peak_memory_bytes": None,
    "losses": [4.0, 3.0, 2.0],
    "ratio": {"median": 1, "p10": 1, "p90": 1},
}
SPREAD = {"median": 1.25, "p10": 1.2, "p90": 1.3}
LONG_NAME = "attention: a_very_long_operator_name_that_ends_with_backward"
PROFILE = [
    {"part": part, "operator": operator, "seconds": 0.05, "share": 0.5, "calls": 1}
    for part, operator in (LONG_NAME.split(": "), ("everything else", ""))
]
RECORD = {
    "recipe": "tiny",
    "cpu": "Some CPU",
    "threads": 2,
    "gpu": "NVIDIA H200",
    "device": "cpu",
    "dtype": "float32",
    "parameters": 1_000_000,
    "shape": {"vocab_size": 300},
    "micro_batch_size": 2,
    "context_tokens": 16,
    "steps": 3,
    "warmup_steps": 1,
    "implementations": {
        "tritium": ROW,
        "tritium, sdpa": {**ROW, "kind": "tritium, sdpa"},
        "baseline": {**ROW, "kind": "baseline", "ratio": SPREAD},
    },
    "agreement": {
        "tritium": {
            "loss_gap": 1e-6,
            "loss_bound": 1e-4,
            "gradient_gap": 2e-6,
            "gradient_bound": 2e-4,
        }
    },
    "profile": {"tritium": PROFILE, "baseline": PROFILE[1:]},
}


def test_a_cpu_record_shows_speeds_ratio_losses_and_what_is_not_measured():
    shown = render(RECORD)
    assert "tiny on Some CPU, 2 threads: 1,000,000 parameters" in shown
    assert "1,234    100.00   90.00 to 200.00" in shown
    assert (
        "tritium has 1.25 times the tokens/s of baseline (p10 to p90 of the rounds: 1.20" in shown
    )
    assert f"{'baseline':24}    4.0000    3.0000    2.0000" in shown
    assert "No Triton kernel runs on a CPU" in shown
    assert "No MFU" in shown
    assert "attention: a_very_l...ends_with_backward" in shown


def test_a_gpu_record_shows_mfu_and_memory_and_no_notes():
    record = copy.deepcopy(RECORD) | {"device": "cuda"}
    for row in record["implementations"].values():
        row |= {"mfu": 0.456, "peak_memory_bytes": 1_500_000_000}
    shown = render(record)
    assert "tiny on NVIDIA H200" in shown
    assert "45.6%       1.50 GB" in shown
    assert "No " not in shown


@pytest.mark.parametrize(("p90", "is_recommended"), [(0.9, True), (1.1, False)])
def test_an_attention_is_recommended_if_it_is_faster_in_nine_of_ten_rounds(p90, is_recommended):
    record = copy.deepcopy(RECORD)
    spread = {"median": 0.8, "p10": 0.7, "p90": p90}
    record["implementations"]["tritium, sdpa"]["ratio"] = spread
    advice = "--attention sdpa is faster here: 1.25 times the tokens/s"
    assert (advice in render(record)) == is_recommended

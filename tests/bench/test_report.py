import json

import pytest

from tritium.bench import RESULTS, record
from tritium.bench import report as report_module
from tritium.bench.record import write_record
from tritium.bench.report import NO_GPU, REPORT, main, report
from tritium.errors import InputError

pytestmark = pytest.mark.plain

ROW = {
    "direction": "both",
    "seconds": {"median": 1e-4, "p10": 9e-5, "p90": 2e-4},
    "rate": 3e12,
    "share": 0.75,
    "peak_bytes": 10,
}
ENTRY = {
    "operator": "layer_norm",
    "shape": [8, 64],
    "label": "M=8 N=64",
    "bound": "bytes",
    "missing": {"liger": "liger_kernel is not installed"},
    "failed": {"quack": "output 0 is off by 1"},
    "rows": [
        {
            **ROW,
            "seconds": {**ROW["seconds"], "median": 4e-5},
            "direction": "forward",
            "implementation": "tritium",
        },
        *({**ROW, "implementation": name} for name in ("tritium", "eager")),
    ],
}
QUACK_SECONDS = {"median": 2e-4, "p10": 0, "p90": 1, "timed_by": "backlog"}
QUACK = {**ROW, "implementation": "quack", "seconds": QUACK_SECONDS}
KERNELS = {
    "device": "cuda",
    "dtype": "torch.bfloat16",
    "ceilings": {"bytes_per_second": 4e12, "flops_per_second": 7e14},
    "entries": [
        ENTRY,
        {**ENTRY, "label": "M=8 N=65", "failed": {}, "rows": [*ENTRY["rows"], QUACK]},
    ],
}
IMPLEMENTATION = {
    "compiled": True,
    "tokens_per_second": 123456.7,
    "step_seconds": {"median": 0.1, "p10": 0.09, "p90": 0.2},
    "mfu": 0.5,
    "peak_memory_bytes": 2e9,
    "ratio": {"median": 1.25, "p10": 1.2, "p90": 1.3},
}
TRAIN = {
    "device": "cuda",
    "dtype": "bfloat16",
    "recipe": "gpt2",
    "shape": {"vocab_size": 50257},
    "micro_batch_size": 8,
    "context_tokens": 1024,
    "implementations": {
        "tritium": IMPLEMENTATION,
        "baseline": {**IMPLEMENTATION, "mfu": None, "peak_memory_bytes": None},
    },
}


PREDICT = {
    "assumptions": {},
    "steps": [
        {
            "recipe": "gpt2",
            "gpu_name": "h200",
            "batch": 64,
            "micro_batch": 32,
            "context_tokens": 1024,
            "floor_seconds": 0.08,
            "seconds": 0.1234,
            "tokens_per_second": 531_000.4,
            "mfu": 0.456,
            "parts": {"MLP": 0.04, "norms": 0.006},
        }
    ],
}


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record.torch.cuda, "get_device_name", lambda: "NVIDIA H200")


def test_the_committed_report_says_what_the_json_files_say():
    """After new results: `tritium bench report`."""
    assert REPORT.read_text(encoding="utf-8") == report(RESULTS)


def test_gpu_records_become_tables_of_times(tmp_path, on_gpu):
    write_record(tmp_path / "h200" / "kernels.json", "kernels", KERNELS)
    write_record(tmp_path / "h200" / "train.json", "train", TRAIN)
    text = report(tmp_path)
    assert "NVIDIA H200" in text
    assert "4.00 TB/s, 700 TFLOP/s" in text
    assert "| `layer_norm` | M=8 N=64 | 40.0 / 100.0 | 100.0 | failed | 75% |" in text
    assert "| `layer_norm` | M=8 N=65 | 40.0 / 100.0 | 100.0 | 200.0* | 75% |" in text
    assert "| tritium | 123,457 | 50.0% | 100.0 | 90.0-200.0 | 2.0 | 1.25 (1.20-1.30) |" in text
    assert "| baseline | 123,457 | - | 100.0 | 90.0-200.0 | - | 1.25 (1.20-1.30) |" in text
    one_round = {**IMPLEMENTATION, "ratio": dict.fromkeys(("median", "p10", "p90"), 1.25)}
    figures = {**TRAIN, "implementations": {"tritium": one_round}}
    write_record(tmp_path / "one" / "train.json", "train", figures)
    assert "ratios are medians of the rounds" in text
    text_of_one = report(tmp_path / "one")
    assert "one round of steps:" in text_of_one
    assert "| 90.0-200.0 | 2.0 | 1.25 |" in text_of_one
    assert NO_GPU not in text
    assert "without" not in text
    eager = {**IMPLEMENTATION, "compiled": False}
    figures = {**TRAIN, "implementations": {"tritium": eager}, "cuda_graph": False}
    write_record(tmp_path / "h200" / "train.json", "train", figures)
    text = report(tmp_path)
    assert "gpt2, vocabulary of 50,257, 8 x 1024 tokens per step, without torch.compile, " in text
    assert "without CUDA graphs, bfloat16" in text


def test_a_predicted_step_is_a_row_that_is_called_an_estimate(tmp_path):
    write_record(tmp_path / "predict.json", "predict", PREDICT)
    text = report(tmp_path)
    assert "ESTIMATES, except measured ms." in text
    row = (
        "gpt2, 64 x 1024 tokens in micro-batches of 32 | h200 | 80.0 | 123.4 | - | 531,000 | 45.6%"
    )
    assert f"| {row} | 40.0 | 6.0 |" in text


def test_variants_of_a_launch_are_rows_the_fastest_first(tmp_path, on_gpu):
    def samples(seconds):
        return {"forward": {"median": seconds}, "both": {"median": 3 * seconds}}

    entry = {
        "label": "M=8 N=64",
        "seconds": {"as shipped": samples(2e-5), "other": samples(1e-5)},
        "failed": {"third": "dx is off by 1"},
    }
    figures = {"device": "cuda", "operator": "layer_norm", "entries": [entry]}
    write_record(tmp_path / "tune.json", "tune", figures)
    text = report(tmp_path)
    assert "| M=8 N=64 | forward | both |\n|---|--:|--:|\n| other | 10.0 | 30.0 |" in text
    assert "| as shipped | 20.0 | 60.0 |\n| third | failed: dx is off by 1 | |" in text


def test_a_command_of_device_sh_has_a_row_per_part(tmp_path, on_gpu):
    part = {"name": "tests", "seconds": 61.4, "last_line": "1 failed | 9 passed"}
    parts = [
        {**part, "status": "failed", "failed_tests": ["tests/a.py::test_x"]},
        {**part, "status": "stopped"},
    ]
    inner = {"kind": "train", "format": record.FORMAT, **record.provenance(), **TRAIN}
    old = {**inner, "format": record.FORMAT - 1, "recipe": "old"}
    records = {"train-64.json": inner, "train-32.json": old}
    figures = {"command": "train", "parts": parts, "records": records}
    write_record(tmp_path / "train.json", "device", figures)
    text = report(tmp_path)
    assert "| tests | failed | 61 | tests/a.py::test_x |" in text
    assert "| tests | stopped | 61 | 1 failed / 9 passed |" in text
    assert "gpt2, vocabulary of 50,257, 8 x 1024" in text
    assert "old, 8 x 1024" not in text
    assert "| tritium | 123,457 |" in text
    assert NO_GPU not in text


def test_rounds_of_a_sweep_share_a_line_with_their_mean_and_range(tmp_path):
    row = {"name": "laptop", "options": {"lr": 0.1}, "steps": 1000}
    rows = [
        row | {"processor_seconds": 290, "seconds": 149.6, "bits_per_byte": 1.48},
        row | {"processor_seconds": 290, "seconds": 151, "bits_per_byte": 1.5},
        row | {"name": "other", "note": "a note", "processor_seconds": 7, "bits_per_byte": 2.0},
    ]
    figures = {"recipe": "laptop", "seconds": 300.0, "rows": rows}
    write_record(tmp_path / "sweep.json", "sweep", figures)
    text = report(tmp_path)
    mean = "150 (150 to 151) | 1.490 (1.480 to 1.500)"
    assert f"| laptop | lr 0.1 | 1,000 | 290 | {mean} |" in text
    assert "| other | lr 0.1; a note | 1,000 | 7 | - | 2.000 |" in text


def test_a_run_has_its_lowest_and_its_last_loss(tmp_path):
    names = ("dropout", "embedding_dropout", "attention_dropout")
    train = {"optimizer": "muon", "lr": 0.006, "steps": 30} | dict.fromkeys(names, 0.2)
    row = {"name": "run", "train": train, "seconds": 64.4}
    row["evaluations"] = [[10, 2.0], [20, 1.5], [30, 1.75]]
    stopped = {**row, "name": "stopped", "seconds": None, "evaluations": [[10, 2.0]]}
    figures = {"rows": [row, stopped, {**row, "evaluations": []}], "note": "A note."}
    write_record(tmp_path / "runs.json", "runs", figures)
    text = report(tmp_path)
    options = "muon | 0.006 | 0.2, 0.2, 0.2"
    assert f"| run | {options} | 30 of 30 | 64 | 1.5000, 20 | 1.7500 |" in text
    assert f"| stopped | {options} | 10 of 30 | - | 2.0000, 10 | 2.0000 |\n\nA note." in text
    assert text.count("| run |") == 1 + 1  # the head and the row


def test_the_table_of_machine_code_has_all_architectures(tmp_path):
    """A newer Triton with fewer architectures does not replace it."""
    row = dict.fromkeys(("registers", "spilled_bytes", "shared_bytes", "blocks_per_sm"), 1)
    row |= {"operator": "rotary", "shape": "N=1", "kernel": "k", "limited_by": "registers"}
    row["matrix_instructions"] = {}
    for version, archs in (("3.6.0", 2), ("3.7.1", 2), ("3.9.0", 1)):
        path = tmp_path / f"{version}.json"
        rows = [row | {"arch": arch} for arch in ("sm_90", "sm_80")[:archs]]
        write_record(path, "codegen", {"rows": rows})
        path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": version}))
    text = report(tmp_path)
    assert "(triton 3.7.1, " in text
    assert "3.6.0" not in text
    assert "3.9.0" not in text


def test_the_command_writes_the_report(tmp_path, monkeypatch):
    write_record(tmp_path / "train.json", "train", TRAIN)
    monkeypatch.setattr(report_module, "RESULTS", tmp_path)
    monkeypatch.setattr(report_module, "REPORT", tmp_path / "REPORT.md")
    assert main([]) == 0
    assert (tmp_path / "REPORT.md").read_text(encoding="utf-8") == report(tmp_path)


def test_the_report_of_another_folder_is_printed_and_not_written(tmp_path, capsys):
    write_record(tmp_path / "train.json", "train", TRAIN)
    (tmp_path / "other.json").write_text("[]")
    before = REPORT.read_bytes()
    assert main([str(tmp_path)]) == 0
    assert "| tritium | 123,457 |" in capsys.readouterr().out
    assert REPORT.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("kind", "key"), [("machine", "ceilings"), ("codegen", "rows"), ("device", "command")]
)
def test_a_record_without_a_key_is_named(kind, key, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"kind": kind, "format": record.FORMAT}))
    with pytest.raises(
        InputError, match=rf"x\.json: expected .* kind '{kind}' with the key '{key}'"
    ):
        main([str(tmp_path)])


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_records_raises(name, tmp_path):
    with pytest.raises(
        InputError,
        match="expected a folder with records of format 2 of train, kernels, runs, sweep, nanogpt, "
        "tune, machine, predict, traffic, codegen, device, found none",
    ):
        main([str(tmp_path / name)])

from pathlib import Path

import pytest

from tritium.bench import record, report
from tritium.bench.record import write_record
from tritium.bench.report import BEGIN, END, figures, main, write_readme
from tritium.errors import InputError

pytestmark = pytest.mark.plain

ROW = {
    "seconds": {"median": 1e-4, "p10": 9e-5, "p90": 2e-4},
    "rate": 3e12,
    "share": 0.75,
    "peak_bytes": 10,
}
ENTRY = {
    "operator": "layer_norm", "shape": [8, 64], "label": "M=8 N=64", "bound": "bytes", "absent": {"liger": "absent"},
    "refused": {"quack": "off"}, "rows": [{**ROW, "contestant": name, "direction": "both"} for name in ("tritium", "eager")],
}  # fmt: skip
OTHER = {
    **ENTRY,
    "label": "M=8 N=65",
    "rows": [*ENTRY["rows"], {**ROW, "contestant": "quack", "direction": "both"}],
}
KERNELS = {
    "device": "cuda",
    "dtype": "torch.bfloat16",
    "ceilings": {"bytes_per_second": 4e12, "flops_per_second": 7e14},
    "entries": [ENTRY, OTHER],
}
CONTESTANT = {
    "tokens_per_second": 123456.7,
    "step_seconds": {"median": 0.1, "p10": 0.09, "p90": 0.2},
    "mfu": 0.5,
    "peak_memory_bytes": 2e9,
}
TRAIN = {
    "device": "cuda",
    "recipe": "gpt2",
    "contestants": {
        "tritium": CONTESTANT,
        "baseline": {**CONTESTANT, "mfu": None, "peak_memory_bytes": None},
    },
}


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record.torch.cuda, "get_device_name", lambda: "NVIDIA H200")


def test_readme_holds_what_the_results_say():
    """After new results: `tritium bench report`."""
    text = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == f"\n\n{figures()}\n\n"


def test_without_a_gpu_file_it_says_so(tmp_path):
    write_record(tmp_path / "kernels.json", "kernels", {**KERNELS, "device": "cpu"})
    assert figures(tmp_path) == (
        "No GPU has measured tritium yet: `bench/results` holds no file from one, so no speed on a GPU is stated here."
    )


def test_gpu_files_become_tables(tmp_path, on_a_gpu):
    write_record(tmp_path / "h200" / "kernels.json", "kernels", KERNELS)
    write_record(tmp_path / "h200" / "train.json", "train", TRAIN)
    text = figures(tmp_path)
    assert "NVIDIA H200" in text
    assert "4.00 TB/s, 700 TFLOP/s" in text
    assert "| `layer_norm` | M=8 N=64 | 100.0 | 100.0 | refused | 75% |" in text
    assert "| tritium | 123,457 | 50.0% | 100.0 | 90.0-200.0 | 2.0 |" in text
    assert "| baseline | 123,457 | - | 100.0 | 90.0-200.0 | - |" in text
    assert "No GPU" not in text


def test_alike_machine_code_shares_a_line(tmp_path):
    row = {
        "operator": "layer_norm", "kernel": "_k", "arch": "sm_90", "registers": 40, "spilled_bytes": 0, "shared_bytes": 32,
        "blocks_per_sm": 12, "limited_by": "registers", "matrix_instructions": {}, "tma_loads": 0,
    }  # fmt: skip
    rows = [
        {**row, "shape": "M=8 N=64"},
        {**row, "shape": "M=8 N=65"},
        {**row, "shape": "M=8 N=66", "registers": 50},
    ]
    write_record(
        tmp_path / "codegen.json",
        "codegen",
        {"rows": [*rows, {**row, "shape": "M=8 N=64", "arch": "sm_80"}]},
    )
    lines = [line for line in figures(tmp_path).splitlines() if "`_k`" in line]
    assert lines == [
        "| `layer_norm` | `_k` | N=64, N=65 | 40 | 0 | 32 | 12 | registers | - |",
        "| `layer_norm` | `_k` | N=66 | 50 | 0 | 32 | 12 | registers | - |",
    ]


def test_bytes_counted_become_tables(tmp_path):
    passes = {
        "forward": {"token_bytes": 4000, "step_bytes": 10**6},
        "backward": {"token_bytes": 500, "step_bytes": 10**5},
    }
    row = {
        "d_model": 50,
        "tritium": passes,
        "eager": passes,
        "least": {"forward": 300, "backward": 100},
    }
    memory = {"way": "gelu_mlp", "kept": 2.0, "most": 4.25, "allocated": 4.75}
    counted = {
        "dtype": "torch.bfloat16", "itemsize": 2, "blocks": [{**row, "preset": "gpt2"}],
        "mlp": [{**memory, "preset": "gpt2"}, {**memory, "preset": "gpt2-xl"}, {**memory, "preset": "other", "kept": 1.0}],
    }  # fmt: skip
    write_record(tmp_path / "traffic.json", "traffic", counted)
    lines = figures(tmp_path).splitlines()
    ours = "4,000 (40.0) | 500 (5.0) | 4,500 (45.0)"
    assert f"| gpt2 | {ours} | {ours} | 300 (3.0) | 100 (1.0) | 400 (4.0) | 1.1 / 1.1 |" in lines
    assert "| `gelu_mlp` | gpt2, gpt2-xl | 2.00 | 4.25 | 4.75 |" in lines
    assert "| `gelu_mlp` | other | 1.00 | 4.25 | 4.75 |" in lines


def test_estimates_stand_where_nothing_is_measured(tmp_path, on_a_gpu):
    row = {
        "peer": "tritium", "arch": "sm_90", "tile": [128, 256, 64], "registers": 160, "spilled_bytes": 0, "blocks_per_sm": 1,
        "hottest_loop": {"estimate": {"overlapped": 0.948}},
        "widths": [{"d_model": 768, "device_share": 0.384}, {"d_model": 1600, "device_share": 0.8}],
    }  # fmt: skip
    rows = [
        row,
        {**row, "arch": "sm_80"},
        {"peer": "tutorial", "arch": "sm_90", "error": "out of registers", "widths": []},
    ]
    write_record(tmp_path / "peers.json", "gemm_peers", {"n_rows": 32_768, "rows": rows})
    text = figures(tmp_path)
    assert "ESTIMATES, not measurements" in text
    lines = [line for line in text.splitlines() if line.startswith("| t")]
    assert lines == ["| tritium | 128x256x64 | 160 | 0 | 1 | 95% | 38% | 80% |"]
    write_record(tmp_path / "train.json", "train", TRAIN)
    assert "ESTIMATES" not in figures(tmp_path)


def test_only_what_lies_between_the_markers_changes(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert write_readme(readme, "new")
    assert readme.read_text() == f"above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"
    assert not write_readme(readme, "new")
    readme.write_text("no markers")
    with pytest.raises(InputError, match="expected one line '<!-- figures"):
        write_readme(readme, "new")
    assert readme.read_text() == "no markers"


def test_a_folder_is_shown_and_nothing_written(tmp_path, capsys):
    write_record(tmp_path / "train.json", "train", TRAIN)
    (tmp_path / "other.json").write_text("[]")
    before = Path(report.ROOT / "README.md").read_bytes()
    assert main([str(tmp_path)]) == 0
    assert "| tritium | 123,457 |" in capsys.readouterr().out
    assert Path(report.ROOT / "README.md").read_bytes() == before


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_records_is_named(name, tmp_path):
    with pytest.raises(
        InputError,
        match="expected a folder with records of format 1 of kernels, train, codegen, traffic, gemm_peers, found none",
    ):
        main([str(tmp_path / name)])


def test_a_record_of_another_format_is_not_passed_over(tmp_path, monkeypatch):
    write_record(tmp_path / "train.json", "train", TRAIN)
    monkeypatch.setattr(record, "FORMAT", 2)
    with pytest.raises(InputError, match="format 2, got kind 'train', format 1"):
        figures(tmp_path)

"""The kernels as they ship against the golden table, and planted faults that must be reported."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton as installed_triton

from tritium.bench.codegen import disassembly, machine_code, table
from tritium.bench.codegen.launches import TARGETS, compile_launch
from tritium.bench.codegen.table import changes, main, regressions, rows_of
from tritium.bench.ops import OPERATORS
from tritium.bench.record import FORMAT, read_record, write_record
from tritium.errors import InputError
from tritium.kernels.attention import launch as attention_launch
from tritium.kernels.core.triton import tl, triton

pytestmark = pytest.mark.codegen

BENCH = Path(table.__file__).parents[1]
GOLDEN = BENCH / "results" / f"codegen-triton-{installed_triton.__version__}.json"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="there is no golden table for this Triton"
)


@needs_golden
@pytest.mark.parametrize("arch", TARGETS)
def test_shipped_configurations_match_the_golden_table(arch):
    """No new spills, lost matrix instructions, lost bulk loads, narrower accesses or other rows.

    If this fails, run `tritium bench codegen --compare GOLDEN` and look.
    """
    operators = dict(OPERATORS)
    if arch == "gfx950":  # the same as gfx942, except for matmuls
        operators = {name: operator for name, operator in operators.items() if "attention" in name}
    golden = [
        row
        for row in read_record(GOLDEN, "codegen")["rows"]
        if row["arch"] == arch and row["operator"] in operators
    ]
    if not golden:
        pytest.skip(f"the golden table of this Triton has no rows for {arch}")
    assert not regressions(rows_of(list(operators.values()), [arch]), golden)


@pytest.mark.plain
@needs_golden
def test_every_kernel_has_rows_in_the_golden_table():
    sources = [path.read_text() for path in (BENCH.parent / "kernels").rglob("*.py")]
    kernels = re.findall(r"^def (_\w+_kernel)\(", "\n".join(sources), re.MULTILINE)
    golden = read_record(GOLDEN, "codegen")["rows"]
    if {row["arch"] for row in golden} != set(TARGETS):
        pytest.skip("the golden table of this Triton lacks architectures that some kernels are for")
    assert {row["kernel"].split()[0] for row in golden} == set(kernels)


@triton.jit
def _good_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    tl.store(c_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)))


@triton.jit
def _spilling_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """A matmul of values that all stay in registers at once, far more than there are registers."""
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    a = tl.load(a_ptr + tile).to(tl.float32)
    b = tl.load(b_ptr + tile).to(tl.float32)
    c = tl.load(c_ptr + tile).to(tl.float32)
    spread = a * tl.sum(b, 0)[None, :] + b * tl.sum(c, 1)[:, None] + c * tl.sum(a, 0)[None, :]
    total = tl.sum(tl.sum(spread, 0), 0)
    dot = tl.dot((a + total).to(tl.bfloat16), (b * total).to(tl.bfloat16))
    tl.store(c_ptr + tile, dot + c * spread + a * b)


@triton.jit
def _scalar_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """An outer product without matrix instructions."""
    offs = tl.arange(0, BLOCK)
    column = tl.load(a_ptr + offs).to(tl.float32)[:, None]
    row = tl.load(b_ptr + offs).to(tl.float32)[None, :]
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], column * row)


@triton.jit
def _specialized_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """c (BLOCK, BLOCK) = a b over K = 1024, with separate warps for loads and for dots."""
    a = tl.make_tensor_descriptor(
        a_ptr, shape=[1024, 1024], strides=[1024, 1], block_shape=[BLOCK, 64]
    )
    b = tl.make_tensor_descriptor(
        b_ptr, shape=[1024, 1024], strides=[1024, 1], block_shape=[64, BLOCK]
    )
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, 1024, 64, warp_specialize=True):
        acc = tl.dot(a.load([0, start]), b.load([start, 0]), acc)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


class Planted:
    """An operator that launches one kernel."""

    name = "planted"
    launch_shapes = ((128,),)
    launch_variants = ()

    def __init__(self, kernel):
        self.kernel = kernel

    def label(self, shape):
        return f"N={shape[0]}"

    def make_inputs(self, shape, dtype, device):
        c = torch.empty(1, device=device)
        return {"x": torch.empty(1, device=device, dtype=dtype), "c": c, "block": shape[0]}

    def ours(self, x, c, block):
        self.kernel[(1,)](x, x, c, BLOCK=block, num_warps=4)
        return c


def planted_row(kernel, arch="sm_90"):
    (row,) = rows_of([Planted(kernel)], [arch])
    return row | {"kernel": "_planted_kernel"}


def test_regressions_are_reported():
    good = planted_row(_good_kernel)
    assert good["spilled_bytes"] == 0
    assert "HGMMA" in good["matrix_instructions"]
    assert regressions([good], [good]) == []
    label = "planted N=128 _planted_kernel sm_90"

    worse = regressions([planted_row(_spilling_kernel)], [good])
    assert any("spills" in line and "golden 0" in line for line in worse)
    assert regressions([planted_row(_scalar_kernel)], [good]) == [f"{label}: lost HGMMA"]
    assert regressions([good], []) == [f"{label}: not in the golden table"]
    assert regressions([], [good]) == [f"{label}: gone"]
    assert regressions([good], [good | {"tma_loads": 1}]) == [f"{label}: lost its TMA loads"]
    narrow = good | {"hottest_loop": good["hottest_loop"] | {"access_bytes": 2}}
    assert regressions([narrow], [good]) == [f"{label}: accesses 2 bytes at a time, golden 16"]
    assert regressions([good], [narrow]) == []


def test_serialized_matrix_instructions_are_reported(monkeypatch):
    """With four warps the scores of 128 x 128 leave too few registers for asynchronous matmuls."""
    planned = attention_launch.plan
    rejected = attention_launch.Tile(block_m=128, block_n=128, num_warps=4, num_stages=2)
    monkeypatch.setattr(
        attention_launch,
        "plan",
        lambda kernel, *rest, **more: (
            rejected if kernel == "fwd" else planned(kernel, *rest, **more)
        ),
    )
    operator = replace(
        OPERATORS["causal_attention"], launch_shapes=((8, 4096, 12, 64),), launch_variants=()
    )
    rows = rows_of([operator], ["sm_90"])
    (worse,) = regressions(rows, rows)
    assert worse.endswith("_causal_attention_fwd_kernel sm_90: matrix instructions are serialized")

    # The assembler's warning and the waits in the loop each show it.
    launches = table.operator_launches(operator, (8, 4096, 12, 64), table.DTYPE, "sm_90")
    for launch in launches:
        compiled = compile_launch(launch, "sm_90")
        # The shipped tile of dk and dv is serialized too: it was measured to be the fastest.
        expected = launch.kernel.__name__ != "_causal_attention_bwd_dq_kernel"
        assert bool(disassembly.performance_warnings(compiled)) == expected
        assert machine_code.is_serialized(disassembly.disassembly(compiled)) == expected


def test_golden_rows_without_a_hottest_loop_are_compared_too():
    row = planted_row(_good_kernel)
    golden = {key: value for key, value in row.items() if key != "hottest_loop"}
    assert regressions([row], [golden]) == regressions([golden], [row]) == []


def test_rows_have_a_hottest_loop_on_nvidia_only():
    for arch in ("sm_80", "sm_120"):
        assert planted_row(_good_kernel, arch)["hottest_loop"]["mix"]["HMMA"] > 0
    assert "hottest_loop" not in planted_row(_good_kernel, "gfx942")


def test_specialized_warps_are_counted_and_have_no_hottest_loop():
    row = planted_row(_specialized_kernel, "sm_100")
    assert row["num_warps"] > 4
    assert "hottest_loop" not in row
    assert planted_row(_good_kernel, "sm_100")["num_warps"] == 4


@pytest.mark.slow
def test_the_command_writes_rows_and_compares_them(tmp_path, capsys):
    out = tmp_path / "codegen.json"
    words = ["attention_decode", "--arch", "sm_90"]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "hottest loop" in shown
    assert "2 rows" in shown
    row = read_record(out, "codegen")["rows"][0]
    assert {*table.FIGURES, "limited_by", "compile_seconds", "hottest_loop"} <= set(row)

    record = json.loads(out.read_text())
    record["rows"][0]["registers"] += 5
    out.write_text(json.dumps(record))
    assert main([*words, "--compare", str(out)]) == 0
    lines = capsys.readouterr().out.split("since commit")[1].splitlines()[1:]
    assert len(lines) == 1
    assert "registers" in lines[0]


@pytest.mark.plain
def test_changes_name_new_changed_and_lost_rows():
    figures = dict.fromkeys(table.FIGURES, 0)

    def row(kernel, arch="sm_80", **changed):
        return {"operator": "o", "shape": "N=1", "kernel": kernel, "arch": arch} | figures | changed

    rows = [row("same"), row("more", registers=5), row("new")]
    old = [row("same"), row("more"), row("lost"), row("lost", arch="sm_90")]
    assert changes(rows, old) == [
        "o N=1 lost sm_80: gone",
        "o N=1 more sm_80: registers 0 -> 5",
        "o N=1 new sm_80: new",
    ]
    assert changes(rows, rows) == []


@pytest.mark.plain
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layernorm"], "unknown operator 'layernorm'; did you mean 'layer_norm'"),
        (["--arch", "sm90"], "unknown architecture 'sm90'; did you mean 'sm_90'"),
        (["--arch"], r"--arch: expected one or more of sm_80, .*, got none"),
        (["--compare", "/nowhere.json"], None),
    ],
)
def test_bad_options_raise(words, message):
    with pytest.raises((InputError, FileNotFoundError), match=message):
        main(words)


@pytest.mark.plain
def test_files_are_checked_before_anything_is_compiled(tmp_path):
    path = tmp_path / "x.json"
    write_record(path, "codegen", {"rows": [{"operator": "layer_norm"}]})
    expected = r"x\.json: expected rows with arch, blocks_per_sm, .*, got others"
    with pytest.raises(InputError, match=expected):
        main(["--compare", str(path)])
    path.write_text(json.dumps({"kind": "codegen", "format": FORMAT, "rows": []}))
    with pytest.raises(InputError, match=r"x\.json: expected a record with the key 'commit'"):
        main(["--compare", str(path)])
    with pytest.raises(InputError, match="expected a file that can be written, got a folder"):
        main(["--out", str(tmp_path)])


@pytest.mark.plain
def test_a_smaller_run_does_not_replace_a_larger_table(tmp_path):
    path = tmp_path / "x.json"
    row = {"operator": "rotary", "shape": "", "kernel": ""} | dict.fromkeys(table.FIGURES, 0)
    rows = [row | {"arch": arch} for arch in ("sm_80", "sm_90")]
    write_record(path, "codegen", {"rows": rows})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"expected no row of other operators .*, got 1; name"):
        main(["rotary", "--arch", "sm_80", "--out", str(path)])
    assert path.read_bytes() == before

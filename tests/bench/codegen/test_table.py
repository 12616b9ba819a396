"""The shipped configurations against the committed table, and planted faults that the comparison must see."""

import json
import re
from pathlib import Path

import pytest
import torch
import triton as installed_triton

from tritium.bench.codegen import table as codegen
from tritium.bench.codegen.launches import TARGETS
from tritium.bench.codegen.table import main, regressions, rows_of
from tritium.bench.ops import OPERATORS
from tritium.bench.record import read_record, write_record
from tritium.errors import InputError
from tritium.kernels.core.triton import tl, triton

pytestmark = pytest.mark.codegen

RESULTS = Path(codegen.__file__).parents[1] / "results"
HELD = RESULTS / f"codegen-triton-{installed_triton.__version__}.json"


@pytest.mark.skipif(not HELD.exists(), reason="no table is held for this Triton")
@pytest.mark.parametrize("arch", TARGETS)
def test_shipped_configurations_hold_the_committed_table(arch):
    """A new spill, a lost matrix instruction or bulk load, a new or missing row: run `tritium bench codegen` and look."""
    operators = {name: operator for name, operator in OPERATORS.items() if operator.launches}
    if arch == "gfx950":  # but for matrix products it is as gfx942
        operators = {name: operator for name, operator in operators.items() if "attention" in name}
    held = [
        row
        for row in read_record(HELD, "codegen")["rows"]
        if row["arch"] == arch and row["operator"] in operators
    ]
    assert not regressions(rows_of(list(operators.values()), [arch]), held)


@pytest.mark.plain
@pytest.mark.skipif(not HELD.exists(), reason="no table is held for this Triton")
def test_every_kernel_has_held_rows():
    """On the architectures where it is launched: what follows a product is a kernel of its own on some, and fused on others."""
    held, sources = (
        read_record(HELD, "codegen")["rows"],
        Path(codegen.__file__).parents[2] / "kernels",
    )
    assert {row["kernel"].split()[0] for row in held} == {
        name
        for path in sources.rglob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }


@triton.jit
def _fine_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    tl.store(c_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)))


@triton.jit
def _crowded_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """The same product from values that all four warps keep at once, far more than they have registers."""
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    a = tl.load(a_ptr + tile).to(tl.float32)
    b = tl.load(b_ptr + tile).to(tl.float32)
    c = tl.load(c_ptr + tile).to(tl.float32)
    spread = a * tl.sum(b, 0)[None, :] + b * tl.sum(c, 1)[:, None] + c * tl.sum(a, 0)[None, :]
    total = tl.sum(tl.sum(spread, 0), 0)
    tl.store(
        c_ptr + tile,
        tl.dot((a + total).to(tl.bfloat16), (b * total).to(tl.bfloat16)) + c * spread + a * b,
    )


@triton.jit
def _scalar_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """A product without matrix instructions."""
    offs = tl.arange(0, BLOCK)
    column = tl.load(a_ptr + offs).to(tl.float32)[:, None]
    tl.store(
        c_ptr + offs[:, None] * BLOCK + offs[None, :],
        column * tl.load(b_ptr + offs).to(tl.float32)[None, :],
    )


class Planted:
    """An operator of one launch whose kernel can be exchanged; rows carry one name whatever the kernel."""

    name, launch_shapes = "planted", ((128,),)

    def __init__(self, kernel):
        self.kernel = kernel

    def label(self, shape):
        return f"N={shape[0]}"

    def launches(self, shape, dtype):
        x, y = torch.empty(1, device="meta", dtype=dtype), torch.empty(1, device="meta")
        self.kernel[(1,)](x, x, y, BLOCK=shape[0], num_warps=4)


def planted(kernel, arch="sm_90"):
    (row,) = rows_of([Planted(kernel)], [arch])
    return row | {"kernel": "_planted_kernel"}


def test_planted_faults_are_seen():
    fine = planted(_fine_kernel)
    assert fine["spilled_bytes"] == 0
    assert "HGMMA" in fine["matrix_instructions"]
    assert regressions([fine], [fine]) == []
    spilling, scalar = planted(_crowded_kernel), planted(_scalar_kernel)
    assert [
        line for line in regressions([spilling], [fine]) if "spills" in line and "held 0" in line
    ]
    assert regressions([scalar], [fine]) == ["planted N=128 _planted_kernel sm_90: lost HGMMA"]
    assert regressions([fine], []) == ["planted N=128 _planted_kernel sm_90: not in the held table"]
    assert regressions([], [fine]) == ["planted N=128 _planted_kernel sm_90: gone"]
    assert regressions([fine], [fine | {"tma_loads": 1}]) == [
        "planted N=128 _planted_kernel sm_90: lost its TMA loads"
    ]
    narrow = fine | {"hottest_loop": fine["hottest_loop"] | {"access_bytes": 2}}
    assert regressions([narrow], [fine]) == [
        "planted N=128 _planted_kernel sm_90: loads and stores 2 bytes at a time, held 16"
    ]
    assert regressions([fine], [narrow]) == []


def test_loops_are_estimated_where_rates_are_known_and_held_rows_may_lack_them():
    for arch in ("sm_80", "sm_90", "sm_100"):
        row = planted(_fine_kernel, arch)
        assert row["hottest_loop"]["clocks"]["tensor"] > 0
        held = {key: value for key, value in row.items() if key != "hottest_loop"}
        assert regressions([row], [held]) == regressions([held], [row]) == []
    assert "hottest_loop" not in planted(_fine_kernel, "sm_120")


@triton.jit
def _specialized_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    """c (BLOCK, BLOCK) = a a over K = 1024, loads and products by warps of their own."""
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


def test_specialized_warps_are_counted_and_their_loops_not_estimated():
    row = planted(_specialized_kernel, "sm_100")
    assert row["num_warps"] > 4
    assert "hottest_loop" not in row
    assert planted(_fine_kernel, "sm_100")["num_warps"] == 4


def test_command_writes_rows_and_compares(tmp_path, capsys):
    out = tmp_path / "codegen.json"
    assert main(["attention_decode", "--arch", "sm_90", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "ESTIMATED" in shown
    assert "2 rows" in shown
    row = read_record(out, "codegen")["rows"][0]
    assert {
        "registers",
        "spilled_bytes",
        "shared_bytes",
        "blocks_per_sm",
        "limited_by",
        "compile_seconds",
    } <= set(row)
    assert set(row["hottest_loop"]["clocks"]) == {
        "tensor",
        "mufu",
        "fma",
        "alu",
        "issue",
        "shared",
        "memory",
    }

    record = json.loads(out.read_text())
    record["rows"][0]["registers"] += 5
    out.write_text(json.dumps(record))
    assert main(["attention_decode", "--arch", "sm_90", "--compare", str(out)]) == 0
    changes = capsys.readouterr().out.split("since commit")[1].splitlines()[1:]
    assert len(changes) == 1
    assert "registers" in changes[0]


@pytest.mark.plain
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layernorm"], "no operator with kernels 'layernorm'; near: layer_norm"),
        (["--arch", "sm90"], "no architecture 'sm90'; near: sm_90"),
        (["--compare", "/nowhere.json"], None),
    ],
)
def test_bad_input(words, message):
    with pytest.raises((InputError, FileNotFoundError), match=message):
        main(words)


@pytest.mark.plain
def test_rows_of_another_shape_and_folders_are_refused_before_the_work(tmp_path):
    path = tmp_path / "x.json"
    write_record(path, "codegen", {"rows": [{"operator": "layer_norm"}]})
    with pytest.raises(
        InputError, match=r"x\.json: expected rows with arch, blocks_per_sm, .*, got others"
    ):
        main(["--compare", str(path)])
    with pytest.raises(InputError, match="expected a file that can be written, got a folder"):
        main(["--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"--arch: expected one or more of sm_80, .*, got none"):
        main(["--arch"])


def test_a_held_table_is_not_cut_short_and_gone_rows_are_named(tmp_path, capsys):
    path = tmp_path / "x.json"
    assert main(["rotary", "--arch", "sm_80", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    record["rows"].append(record["rows"][0] | {"kernel": "_other_kernel"})
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["rotary", "--arch", "sm_80", "--compare", str(path)]) == 0
    assert "_other_kernel sm_80: gone" in capsys.readouterr().out

    record["rows"].append(record["rows"][0] | {"arch": "sm_90"})
    path.write_text(json.dumps(record))
    with pytest.raises(
        InputError,
        match="expected no row of other operators or architectures, got 1; name another file",
    ):
        main(["rotary", "--arch", "sm_80", "--out", str(path)])
    assert json.loads(path.read_text()) == record


@pytest.mark.plain
def test_a_record_of_another_format_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"kind": "codegen", "format": 0, "rows": []}')
    with pytest.raises(
        InputError,
        match=r"old\.json: expected a record of kind 'codegen', format 1, got kind 'codegen', format 0",
    ):
        main(["--compare", str(path)])

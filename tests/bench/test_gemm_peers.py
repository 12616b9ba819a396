"""The table of products on our plain one and a small tutorial of our own; no network."""

import pytest

from tritium.bench import gemm_peers
from tritium.bench.gemm_peers import OURS, compare, shares
from tritium.bench.peers import Peer, kernels_of
from tritium.bench.record import read_record
from tritium.kernels._gemm import plain
from tritium.kernels._mlp_kernels import EPILOGUES
from tritium.train.config import InputError

pytestmark = pytest.mark.codegen

# A program a tile; what stands behind the launcher needs a GPU.
TUTORIAL = """
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(a_ptr, b_ptr, c_ptr, N, K, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_n, offs_k = tl.program_id(1) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N), tl.arange(0, BLOCK_SIZE_K)
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    for start in range(0, K, BLOCK_SIZE_K):
        a = tl.load(a_ptr + offs_m[:, None] * K + start + offs_k[None, :])
        b = tl.load(b_ptr + (start + offs_k)[:, None] * N + offs_n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(tl.float16))


def matmul(a, b, activation=""):
    assert a.dtype == torch.float16 and activation in ("", "leaky_relu")
    (M, K), N = a.shape, b.shape[1]
    kernel[(M // 64, N // 64)](a, b, a, N, K, BLOCK_SIZE_M=64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=32)


matmul(torch.randn(64, 64, device="cuda"))
"""


@pytest.mark.plain
def test_products_are_those_of_the_perceptron():
    epilogues = []
    for launches in OURS.values():
        kernels = kernels_of(Peer(name="tritium", version={}, launches=launches), 768, "sm_90")
        arguments = next(iter(kernels.values()))[0].arguments
        assert tuple(arguments[size] for size in "MNK") == (32_768, 3072, 768)
        epilogues.append(arguments["EPILOGUE"])
    assert epilogues == [plain, *EPILOGUES["tanh"]]


@pytest.mark.plain
def test_a_tile_takes_its_steps_and_what_is_done_once():
    loop = {"tensor": 100.0, "issue": 50.0, "memory": 900.0}
    row = {"arch": "sm_90", "tile": [128, 256, 64], "hottest_loop": {"clocks": loop}}
    once = {"tensor": 0.0, "issue": 600.0, "memory": 9000.0}
    # 3,072 tiles on 132 multiprocessors are 24 each, less 96.
    expected = {"steps": 12, "tiles": 3072, "tile_share": 0.667, "device_share": round(2 / 3 * 3072 / (24 * 132), 3)}
    assert shares(row | {"once_a_tile": {"clocks": once}}, 768) == expected
    # A step that is not in the loop is among what is done once.
    assert shares(row | {"once_a_tile": {"clocks": once | {"tensor": 100.0}}}, 768)["tile_share"] == round(1200 / 1700, 3)


def test_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gemm_peers, "WIDTHS", (768, 1600))
    monkeypatch.setattr(gemm_peers, "OURS", {"tritium": OURS["tritium"]})
    tutorial, out = tmp_path / "03-small.py", tmp_path / "peers.json"
    tutorial.write_text(TUTORIAL)
    assert compare(["--tutorial", str(tutorial), "--arch", "sm_90", "--out", str(out)]) == 0
    assert "ESTIMATED" in capsys.readouterr().out
    record = read_record(out, "gemm_peers")
    assert len(record["peers"]["tutorial"]["sha256"]) == 64
    ours, theirs, fused = record["rows"]
    assert [row["peer"] for row in record["rows"]] == ["tritium", "tutorial", "tutorial, leaky_relu"]
    assert (ours["spilled_bytes"], list(ours["matrix_instructions"]), ours["tma_loads"] > 0) == (0, ["HGMMA"], True)
    assert theirs["tile"] == [64, 64, 32]
    for row in (ours, theirs):
        assert [entry["d_model"] for entry in row["widths"]] == [768, 1600]
        assert [entry["steps"] for entry in row["widths"]] == [D // row["tile"][2] for D in (768, 1600)]
        narrow, wide = (entry["tile_share"] for entry in row["widths"])
        assert 0 < narrow < wide < row["hottest_loop"]["estimate"]["overlapped"]
    # An epilogue in the loop, and one behind it with the addresses before it: both store c, neither multiplies.
    for row in (ours, theirs):
        assert row["once_a_tile"]["clocks"]["tensor"] == 0 < row["once_a_tile"]["instructions"]
    assert "now_and_then" not in ours["hottest_loop"]
    assert theirs["once_a_tile"]["clocks"]["memory"] > 0
    assert fused["once_a_tile"] == theirs["once_a_tile"], "this one has no activation to fuse"


@pytest.mark.plain
def test_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gemm_peers, "OURS", {})
    with pytest.raises(InputError, match=r"--tutorial: expected the file 03-matrix-multiplication.py, found none at .*nowhere"):
        compare(["--tutorial", str(tmp_path / "nowhere.py")])
    (tmp_path / "wrong.py").write_text("x = 1")
    with pytest.raises(InputError, match="expected a function `matmul`, found none"):
        compare(["--tutorial", str(tmp_path / "wrong.py"), "--arch", "sm_90"])

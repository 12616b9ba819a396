"""The tool on small projects of our own with the shapes of the real ones: what it finds, counts and refuses; no network."""

import subprocess
import textwrap

import pytest

from tritium.bench import attention_peers
from tritium.bench.attention_peers import compare, fla_peer, products, rows_of, shares_of, tutorial_peers
from tritium.bench.record import read_record
from tritium.train.config import InputError

pytestmark = pytest.mark.codegen

# An autograd function under triton.autotune: one configuration does not compile, the others differ in their tiles.
TUTORIAL = """
import torch
import triton
import triton.language as tl

DEVICE = triton.runtime.driver.active.get_active_torch_device()
MAJOR = torch.cuda.get_device_capability()[0]
triton.set_allocator(lambda size, alignment, stream: None)


def prune(configs, named_args, **kwargs):
    return [config for config in configs if config.kwargs["BLOCK_M"] < 256]


configs = [triton.Config({"BLOCK_M": m}, num_warps=4) for m in (32, 64, 128, 256)]


@triton.autotune(configs, key=["T"], prune_configs_by={"early_config_prune": prune})
@triton.jit
def _fwd(q_ptr, k_ptr, o_ptr, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, K: tl.constexpr):
    tl.static_assert(BLOCK_M != 32)
    offs, offs_n, offs_k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, K)
    q = tl.load(q_ptr + offs[:, None] * K + offs_k[None, :])
    acc = tl.zeros((BLOCK_M, K), tl.float32)
    for start in range(0, T, BLOCK_N):
        k = tl.load(k_ptr + (start + offs_n)[:, None] * K + offs_k[None, :])
        acc = tl.dot(tl.exp2(tl.dot(q, k.T)).to(k.dtype), k, acc)
    tl.store(o_ptr + offs[:, None] * K + offs_k[None, :], acc)


@triton.jit
def _bwd(do_ptr, dq_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(dq_ptr + offs, tl.load(do_ptr + offs) * 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale, specialized):
        assert causal and MAJOR >= 8 and q.dtype == torch.float16
        o = torch.empty_like(q)
        _fwd[lambda meta: (q.shape[2] // meta["BLOCK_M"],)](q, k, o, q.shape[2], BLOCK_N=64, K=q.shape[3])
        return o

    @staticmethod
    def backward(ctx, do):
        dq = torch.empty_like(do)
        _bwd[(1,)](do, dq, BLOCK=1024)
        return dq, dq, dq, None, None, None


attention = _Attention.apply
"""
# One launcher's tiles hang on the shared memory of GPU number 0, and einops is imported for what follows the launches.
FLA = """
import torch
import triton
import triton.language as tl
from einops import reduce
from fla import __version__
from fla.utils import check_shared_mem


@triton.jit(do_not_specialize=["T"])
def small_bwd_kernel(q, T, BT: tl.constexpr, W: tl.constexpr):
    tl.store(q + tl.arange(0, BT), T)


def parallel_attn_fwd(q, k, v, g_cumsum, sink_bias, scale):
    return torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)


def parallel_attn_bwd(q, k, v, g_cumsum, sink_bias, scale, o, lse, do):
    BT = 128 if check_shared_mem("hopper", q.device.index) else 64
    small_bwd_kernel[(1,)](q=q, T=q.shape[1], BT=BT, W=None, num_warps=4)
    return reduce(q, "b t (h g) k -> b t h k", g=1)
"""
FLA_UTILS = """
import torch
import triton


def check_shared_mem(arch, index):
    properties = triton.runtime.driver.active.utils.get_device_properties
    return [properties(i)["max_shared_mem"] for i in range(torch.cuda.device_count())][index] >= 232448
"""


@pytest.fixture
def tutorial(tmp_path):
    path = tmp_path / "06-small.py"
    path.write_text(TUTORIAL)
    return path


@pytest.fixture
def fla(tmp_path):
    folder = tmp_path / "checkout" / "fla"
    (folder / "ops" / "attn").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('the rest of the project')")
    (folder / "utils.py").write_text(FLA_UTILS)
    (folder / "ops" / "attn" / "parallel.py").write_text(FLA)
    return folder.parent


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_configuration_that_a_tuner_keeps_is_tried_and_the_best_one_shown(tutorial, arch):
    fwd, bwd = rows_of(tutorial_peers(tutorial)[0], (1, 4096, 2, 64), arch)
    assert (fwd["kernel"], fwd["direction"], bwd["kernel"], bwd["direction"]) == ("_fwd", "fwd", "_bwd", "bwd")
    assert (fwd["configs"], fwd["failed"]) == (3, 1), "256 is pruned, 32 does not compile"
    assert fwd["config"]["BLOCK_M"] in (64, 128)
    assert (fwd["spilled_bytes"], fwd["products"], bwd["products"]) == (0, 2, 0)
    assert fwd["hottest_loop"]["estimate"]["of"] == "tensor"
    assert bwd["configs"] == 1
    (share,) = shares_of([fwd, bwd])
    estimate = fwd["hottest_loop"]["estimate"]
    assert share["overlapped"] == pytest.approx(estimate["overlapped"])
    assert 0 < share["serial"] < share["overlapped"] <= 1


@pytest.mark.parametrize(("arch", "tile"), [("sm_80", 64), ("sm_90", 128)])
def test_launchers_choose_by_the_shared_memory_of_the_gpu_they_are_shown(fla, arch, tile):
    (row,) = rows_of(fla_peer(fla), (1, 4096, 2, 64), arch)
    assert row["config"]["BT"] == tile
    assert row["num_warps"] == 4
    assert shares_of([row]) == [], "no product, no share"


@pytest.mark.plain
def test_products_are_counted_in_the_innermost_loops():
    ttir = """
    %0 = tt.dot %a, %b, %c
    %1 = scf.for %i = %lo to %hi step %s {
      %2 = tt.dot %a, %b, %c
      %3 = scf.for %j = %lo to %hi step %s {
        %4 = scf.if %p {
          %5 = tt.dot %a, %b, %c
        }
        %6 = tt.dot %a, %b, %c
        %7 = tt.dot %a, %b, %c
      }
    }
    scf.for %i = %lo to %hi step %s {
      %8 = tt.dot %a, %b, %c
    }
    """
    assert products(ttir) == 3
    assert products("    %0 = tt.dot %a, %b, %c\n    %1 = tt.dot %a, %b, %c\n") == 2
    assert products("tt.return") == 0


@pytest.mark.plain
def test_useful_shares_weigh_kernels_by_their_time():
    def row(kernel, direction, count, share, of="tensor"):
        found = {"peer": "p", "head": 64, "arch": "sm_90", "kernel": kernel, "direction": direction, "products": count}
        if share:
            found["hottest_loop"] = {"estimate": {"of": of, "overlapped": share, "serial": share / 2}}
        return found

    rows = [row("a", "fwd", 2, 0.8), row("b", "bwd", 4, 0.8), row("c", "bwd", 3, 0.5), row("d", "bwd", 0, 0.9, "memory")]
    fwd, bwd = shares_of(rows)
    assert fwd["overlapped"] == pytest.approx(0.8)
    # 4 products take 5 units of time, 3 take 6: of 11 units 5 would have done.
    assert bwd["overlapped"] == pytest.approx(5 / 11)
    assert bwd["serial"] == pytest.approx(5 / 22)
    # Nothing is said of a direction of which a part has no estimate.
    assert [share["direction"] for share in shares_of([*rows, row("e", "bwd", 1, None)])] == ["fwd"]


def test_command_prints_and_writes(tutorial, fla, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention_peers, "SHAPES", attention_peers.SHAPES[:1])
    monkeypatch.setattr(attention_peers, "our_peer", lambda: None)
    out = tmp_path / "peers.json"
    assert compare(["--tutorial", str(tutorial), "--fla", str(fla), "--arch", "sm_90", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "ESTIMATED" in shown
    assert "small_bwd_kernel" in shown
    record = read_record(out, "attention_peers")
    assert len(record["peers"]["tutorial"]["sha256"]) == 64
    assert record["peers"]["fla"] == {"commit": "unknown"}
    assert {row["peer"] for row in record["rows"]} == {"tutorial", "fla"}
    assert [row["peer"] for row in record["useful"]] == ["tutorial"]


@pytest.mark.plain
def test_a_checkout_is_named_as_git_names_it(fla):
    git = ["git", "-C", str(fla), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    subprocess.run([*git, "tag", "v1"], check=True)
    assert fla_peer(fla).version == {"commit": "v1"}


@pytest.mark.plain
def test_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_peers, "our_peer", lambda: None)
    with pytest.raises(InputError, match="expected --tutorial or --fla with a path, got neither"):
        compare([])
    with pytest.raises(InputError, match=r"--tutorial: expected the file 06-fused-attention.py, found none at .*nowhere\.py"):
        compare(["--tutorial", str(tmp_path / "nowhere.py")])
    with pytest.raises(InputError, match=r"--fla: expected a checkout with fla/ops/attn/parallel\.py, found none in"):
        compare(["--fla", str(tmp_path)])
    for text, message in [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("x = 1", "expected a function `attention`, found none"),
        ("attention = lambda *_: 1 + 'one'", "tutorial: expected launchers that run on meta tensors, got: unsupported operand"),
    ]:
        path = tmp_path / "wrong.py"
        path.write_text(textwrap.dedent(text))
        with pytest.raises(InputError, match=message):
            compare(["--tutorial", str(path), "--arch", "sm_90"])

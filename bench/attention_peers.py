"""Causal attention of two public Triton projects compiled beside ours, for GPUs that need not be there.

    python -m tritium.bench.attention_peers [--tutorial PATH/06-fused-attention.py] [--fla CHECKOUT] [--out FILE.json]

The tutorial is python/tutorials/06-fused-attention.py of triton-lang/triton, fla a checkout of fla-org/flash-linear-attention.
How their launchers come to run, and which of an autotuner's configurations is shown, says peers.py. The tutorial computes in
float16, which tensor pipes take at the rate of bfloat16; fla and ours run in bfloat16.

No figure here is a measurement. All clocks are estimates by one reading of the machine code (machine_code.py), equally blind to
latency for all: `overlapped` is the share of the tensor peak if no pipe ever waited for another, `serial` if nothing
overlapped. Both are ratios, so that tiles of different sizes compare.

    useful   Attention needs 2 products per query and key forward and 5 backward. A kernel that does p_i, some of them again,
             takes p_i / share_i times as long as one product at the peak takes, and a direction the sum over its kernels:
             useful = least / sum_i (p_i / share_i), once from overlapped and once from serial. p_i is the most products in one
             innermost loop of Triton's IR. Passes without products, diagonal tiles and the ends of loops are left out.

Kernels whose warps are specialized, as the tutorial's forward for sm_100 also comes, have resources only: their warps run
different loops side by side. Of their configurations the one with most blocks' warps in flight is shown.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from ..train.cli import run
from ..train.config import InputError
from .codegen import DTYPE, describe
from .kernels.attention import ATTENTION
from .launches import Launch
from .machine_code import RATES
from .peers import Peer, best, function, imported, kernels_of, tutorial_version, write_rows
from .record import writable

Shape = tuple[int, int, int, int]
# B, T, H, K: only the head size and, through masks of whole tiles, the length reach the machine code.
SHAPES: tuple[Shape, ...] = ((8, 4096, 12, 64), (8, 4096, 16, 128))
LEAST_PRODUCTS = {"fwd": 2, "bwd": 5}
# One kernel with two loops one after the other, 4 products for dk and dv, 3 for dq: all 7 at the share of the first.
PRODUCTS = {"_attn_bwd": 7}


# --- the projects


def tutorial_peers(path: Path) -> list[Peer]:
    """The tutorial as it benchmarks itself: plain, and with specialized warps."""
    version = tutorial_version(path, "06-fused-attention.py")

    def launches(shape: Shape, specialized: bool) -> None:
        B, T, H, K = shape
        with imported(path.stem, path.parent) as module:
            attention = function(module, "attention")
            q, k, v = (torch.empty(B, H, T, K, dtype=torch.float16, device="meta", requires_grad=True) for _ in range(3))
            o = attention(q, k, v, True, K**-0.5, specialized)
            if not specialized:
                o.backward(torch.empty_like(o))

    return [
        Peer(name="tutorial", version=version, launches=lambda shape: launches(shape, False)),
        # Only here does it measure them with a causal mask, and only forward.
        Peer(name="tutorial, specialized", version=version, launches=lambda shape: launches(shape, True), archs=("sm_100",)),
    ]


def fla_peer(checkout: Path) -> Peer:
    """fla's parallel attention: its forward and backward launchers."""
    if not (checkout / "fla" / "ops" / "attn" / "parallel.py").is_file():
        raise InputError(f"--fla: expected a checkout with fla/ops/attn/parallel.py, found none in {checkout}")

    def launches(shape: Shape) -> None:
        q, k, v = (torch.empty(shape, dtype=DTYPE, device="meta") for _ in range(3))
        with imported("fla.ops.attn.parallel", checkout, ("fla", "fla.ops", "fla.ops.attn"), ("einops",)) as module:
            # Meta tensors are on no GPU number 0, by which it looks its shared memory up.
            fits = module.check_shared_mem
            module.check_shared_mem = lambda arch, *_: fits(arch, 0)
            inputs = {"q": q, "k": k, "v": v, "g_cumsum": None, "sink_bias": None, "scale": shape[-1] ** -0.5}
            o, lse = module.parallel_attn_fwd(**inputs)
            module.parallel_attn_bwd(**inputs, o=o, lse=lse, do=torch.empty_like(o))

    return Peer(name="fla", version={"commit": _describe_checkout(checkout)}, launches=launches)


def _describe_checkout(checkout: Path) -> str:
    """What git calls the checkout; "unknown" where it is a bare copy of the files."""
    if not (checkout / ".git").exists():
        return "unknown"
    words = ["git", "-C", str(checkout), "describe", "--always", "--tags", "--dirty"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def our_peer() -> Peer | None:
    """Our own kernels, or None while the operator has no launches."""
    if ATTENTION.launches is None:
        return None
    return Peer(name="tritium", version={}, launches=lambda shape: ATTENTION.launches(shape, DTYPE))


# --- rows


def rows_of(peer: Peer, shape: Shape, arch: str) -> list[dict[str, Any]]:
    """Compile a peer's launches at one shape for one architecture; one row a kernel."""

    def row(launch: Launch, compiled, text: str) -> dict[str, Any]:
        count = PRODUCTS.get(launch.kernel.__name__, products(compiled.asm["ttir"]))
        return {**describe(compiled, text, arch), "products": count}

    return [
        {"peer": peer.name, "head": shape[-1], "arch": arch, "kernel": kernel, "direction": "bwd" if "bwd" in kernel else "fwd"}
        | best(candidates, arch, row)
        for kernel, candidates in kernels_of(peer, shape, arch).items()
    ]


def products(ttir: str) -> int:
    """The most matrix products in one innermost loop of Triton's IR; those of the whole kernel where none is in a loop."""
    # Indentation and products of the loops that are open, the kernel itself first.
    loops, most = [[-1, 0]], 0
    for line in ttir.splitlines():
        indentation = len(line) - len(line.lstrip())
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append([indentation, 0])
        elif re.search(r"\btt\.dot\b", line):
            loops[-1][1] += 1
        elif line.lstrip().startswith("}") and indentation == loops[-1][0] and not line.rstrip().endswith("do {"):
            most = max(most, loops.pop()[1])
    return most or loops[0][1]


def shares_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Useful shares of the tensor peak, one row for each peer, head size, architecture and direction that has an estimate."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("peer", "head", "arch", "direction")), []).append(row)
    shares = []
    for key, kernels in groups.items():
        working = [row for row in kernels if row.get("products") or "error" in row]
        estimates = [row["hottest_loop"]["estimate"] for row in working if "hottest_loop" in row]
        if not working or len(estimates) < len(working) or any(estimate["of"] != "tensor" for estimate in estimates):
            continue
        useful = {
            name: LEAST_PRODUCTS[key[-1]] / sum(row["products"] / row["hottest_loop"]["estimate"][name] for row in working)
            for name in ("overlapped", "serial")
        }
        shares.append(dict(zip(("peer", "head", "arch", "direction"), key, strict=True)) | useful)
    return shares


# --- the command


def _cells(row: dict[str, Any], pipes: Sequence[str]) -> list[str]:
    if "error" in row:
        return [row["error"][:60], *[""] * (7 + len(pipes))]
    tiles = [f"{name}={value}" for name, value in row["config"].items() if re.match(r"BLOCK_[MN]\d?$|B[TS]$|maxnreg", name)]
    numbers = [row[name] for name in ("num_warps", "registers", "spilled_bytes", "shared_bytes", "blocks_per_sm")]
    cells = [" ".join(tiles), *map(str, numbers)]
    if "hottest_loop" not in row:
        return cells + [""] * (2 + len(pipes))
    estimate = row["hottest_loop"]["estimate"]
    # Shares of the memory's peak would not compare with the others.
    shares = [f"{estimate[name]:.0%}" if estimate["of"] == "tensor" else "" for name in ("overlapped", "serial")]
    return cells + [f"{row['hottest_loop']['clocks'][pipe]:.0f}" for pipe in pipes] + shares


def print_tables(rows: Sequence[dict[str, Any]], shares: Sequence[dict[str, Any]]) -> None:
    """Kernels of all peers beside one another, then what share of the peak is useful work."""
    console = Console(width=None if Console().is_terminal else 230)
    pipes = ("tensor", "mufu", "fma", "alu", "issue", "shared")
    by = lambda row: (row["head"], list(RATES).index(row["arch"]), row["direction"] == "bwd", row["peer"])  # noqa: E731
    title = (
        f"triton {triton.__version__}: ESTIMATED clocks of a block's pass through its hottest loop, shares of the tensor peak"
    )
    columns = ("config", "warps", "registers", "spilled B", "shared B", "blocks/SM", *pipes, "overlapped", "serial")
    table = Table("head", "arch", "peer", "kernel", *columns, title=title)
    for row in sorted(rows, key=by):
        table.add_row(str(row["head"]), row["arch"], row["peer"], row["kernel"], *_cells(row, pipes))
    console.print(table)
    table = Table(
        "head", "arch", "direction", "peer", "overlapped", "serial", title="ESTIMATED useful share of the tensor peak"
    )
    for row in sorted(shares, key=by):
        names = [str(row["head"]), row["arch"], row["direction"], row["peer"]]
        table.add_row(*names, f"{row['overlapped']:.0%}", f"{row['serial']:.0%}")
    console.print(table)


def compare(argv: Sequence[str]) -> int:
    """Parse the command line, compile, print and write. Returns: exit status."""
    description = __doc__.split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m tritium.bench.attention_peers", description=description)
    parser.add_argument("--tutorial", type=Path, help="triton-lang/triton's python/tutorials/06-fused-attention.py")
    parser.add_argument("--fla", type=Path, help="folder of a checkout of fla-org/flash-linear-attention")
    parser.add_argument("--arch", nargs="+", choices=list(RATES), default=list(RATES), help="default: all")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args(argv)
    peers = [ours] if (ours := our_peer()) else []
    peers += tutorial_peers(options.tutorial.resolve()) if options.tutorial else []
    peers += [fla_peer(options.fla.resolve())] if options.fla else []
    if not peers:
        raise InputError("attention_peers: expected --tutorial or --fla with a path, got neither")
    out = None if options.out is None else writable(options.out)
    rows = [
        row
        for peer in peers
        for arch in options.arch
        if arch in peer.archs
        for shape in SHAPES
        for row in rows_of(peer, shape, arch)
    ]
    shares = shares_of(rows)
    print_tables(rows, shares)
    write_rows(out, "attention_peers", peers, {"rows": rows, "useful": shares})
    return 0


if __name__ == "__main__":
    sys.exit(run(compare, sys.argv[1:]))

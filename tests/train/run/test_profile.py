import gzip
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tritium.train.config import TrainConfig
from tritium.train.run.metrics import read_metrics
from tritium.train.run.profile import BETWEEN, PARTS, first_profiled, operators

pytestmark = pytest.mark.plain

CONFIG = TrainConfig.from_options(steps=1000, eval_interval=20, checkpoint_interval=100, profile=3)


def test_profile_is_written_once_and_does_not_change_the_run(tiny, tritium, tmp_path):
    tiny = [*tiny, "--n-layer", 2]
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert tritium(*tiny, "--out", plain)[0] == 0
    status, _, err = tritium(*tiny, "--profile", 3)
    assert status == 0, err
    losses = [
        [(row["loss"], row["grad_norm"]) for row in read_metrics(folder)[0]]
        for folder in (plain, run)
    ]
    assert losses[0] == losses[1]
    trace = json.loads(gzip.decompress((run / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("data") == 3
    assert "tritium::linear_cross_entropy_fwd" in names
    text = (run / "profile" / "operators.txt").read_text()
    assert text.startswith("steps 11 to 13 ")
    parts, by_operator = text.split("\n\n")
    assert parts in err
    shares = {
        row[:24].strip(): float(row.split()[-1].rstrip("%")) for row in parts.splitlines()[1:]
    }
    assert set(shares) == {*PARTS, "other", BETWEEN}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    # Calls per step: one forward in each of two blocks.
    assert re.search(
        r"^attention +aten::scaled_dot_product_attention .* 2$", by_operator, flags=re.MULTILINE
    )

    before = (run / "profile" / "operators.txt").stat().st_mtime_ns
    shutil.rmtree(run / "checkpoints" / "step-20")
    assert tritium("train", "--resume", run)[0] == 0
    assert (run / "profile" / "operators.txt").stat().st_mtime_ns == before


def test_profiled_steps_have_no_evaluation_or_checkpoint_between_them():
    assert first_profiled(CONFIG) == 10
    assert first_profiled(CONFIG.with_options(profile=0)) is None
    assert first_profiled(CONFIG, first=5) == 15
    # Steps 16 to 18 end before the evaluation at 20. Steps 17 to 19 would end at it.
    assert first_profiled(CONFIG, first=6) == 16
    assert first_profiled(CONFIG, first=7) == 21
    assert first_profiled(CONFIG.with_options(checkpoint_interval=12)) == 13
    assert first_profiled(CONFIG.with_options(steps=14)) == 10
    assert first_profiled(CONFIG.with_options(steps=13)) is None
    assert first_profiled(CONFIG.with_options(profile=18)) == 21
    assert first_profiled(CONFIG.with_options(profile=19)) is None


def test_too_few_steps_to_profile_is_one_line_and_makes_no_run(tiny, error_of, tmp_path):
    assert "--profile: expected 9 steps in a row, after the first 10" in error_of(
        *tiny, "--profile", 9
    )
    assert not (tmp_path / "run").exists()


def test_on_cuda_an_operator_has_the_time_of_its_kernels():
    """With fake events, among them a kernel without an operator and a named range."""

    def event(name, start, end, parent=None, kernels=(), device=DeviceType.CPU, annotation=False):
        launched = [SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels]
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name,
            time_range=span,
            cpu_parent=parent,
            kernels=launched,
            device_type=device,
            is_user_annotation=annotation,
        )

    optimizer = event(
        "Optimizer.step#AdamW.step",
        50,
        60,
        annotation=True,
        kernels=[("Optimizer.step#AdamW.step", 10.0)],
    )
    mlp = event("tritium::gelu_mlp_fwd", 0, 5)
    events = [
        event("data", 0, 1, annotation=True, kernels=[("data", 99.0)]),
        event("aten::copy_", 0, 1, kernels=[("Memcpy HtoD (Pinned -> Device)", 4.0)]),
        mlp,
        event("aten::mm", 1, 2, parent=mlp, kernels=[("nvjet_tst", 20.0)]),
        event("aten::mm", 6, 7, kernels=[("nvjet_tst", 30.0)]),
        optimizer,
        event("aten::add_", 51, 52, parent=optimizer, kernels=[("add_kernel", 10.0)]),
        *(
            event(name, start, end, device=DeviceType.CUDA)
            for name, start, end in [
                ("Memcpy HtoD (Pinned -> Device)", 1, 5),
                ("nvjet_tst", 5, 25),
                ("nvjet_tst", 25, 55),
                ("triton_poi_fused_embedding_0", 55, 60),
                ("add_kernel", 60, 70),
                ("_layer_norm_fwd_kernel", 90, 100),
            ]
        ),
        event("data", 1, 5, device=DeviceType.CUDA, annotation=True),
        event("Optimizer.step#AdamW.step", 60, 70, device=DeviceType.CUDA, annotation=True),
    ]
    rows = operators(events, 2, torch.device("cuda"))
    found = {
        (row.part, row.operator): (round(row.seconds * 2e6), round(row.share, 2), row.calls)
        for row in rows
    }
    assert found == {
        ("matmul", "aten::mm"): (30, 0.3, 0.5),
        (BETWEEN, ""): (21, 0.21, None),
        ("MLP", "aten::mm"): (20, 0.2, 0.5),
        ("optimizer", "aten::add_"): (10, 0.1, 0.5),
        ("norms", "_layer_norm_fwd_kernel"): (10, 0.1, 0.5),
        ("embedding", "triton_poi_fused_embedding_0"): (5, 0.05, 0.5),
        ("data", "aten::copy_"): (4, 0.04, 0.5),
    }
    assert [row.seconds for row in rows] == sorted((row.seconds for row in rows), reverse=True)

from signal import SIGTERM

import pytest

from tritium.train.run.metrics import read_metrics

pytestmark = pytest.mark.plain


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(tiny, launch, tmp_path):
    run = tmp_path / "run"
    endless = []
    for name in ("--steps", "--checkpoint-interval", "--eval-interval"):
        endless += [name, 1_000_000]
    status, out, errors = launch(
        2, *tiny[1:], *endless, "--parallel", "fsdp", signal=[run, 1, SIGTERM]
    )
    assert status == [143, 143], errors
    assert f"torchrun ... -m tritium.train --resume {run}" in out[0]
    assert out[1] == ""
    step = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert [row["step"] for row in read_metrics(run)[0]] == list(range(step))

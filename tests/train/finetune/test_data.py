from pathlib import Path

import pytest
import torch

from tritium.model import GPT
from tritium.train.config import TrainConfig
from tritium.train.finetune.data import TaskData, model_options

pytestmark = pytest.mark.plain


def test_by_default_a_task_trains_a_gpt_and_has_no_results():
    config = TrainConfig.from_options(n_layer=1, n_head=1, d_model=16, attention="sdpa")
    data = TaskData(path=Path("data"), tokenizer=None, train=[1], val=[2])
    assert model_options(config) == {"attention": "sdpa", "recompute": "none"}
    torch.manual_seed(0)
    model = data.new_model(config, config.gpt(20))
    assert type(model) is GPT
    assert data.adapt(model, config) is model
    assert data.fit(config) is config
    assert data.sample(model, config) is None
    assert not data.has_test

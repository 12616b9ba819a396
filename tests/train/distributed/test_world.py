import pytest
import torch

from tritium.errors import InputError
from tritium.train.commands.training import _running
from tritium.train.config import TrainConfig
from tritium.train.distributed.world import World

pytestmark = pytest.mark.plain


def test_more_ranks_than_gpus_raise(monkeypatch):
    monkeypatch.setattr("tritium.train.distributed.world.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        InputError, match="expected at most as many ranks as the 1 GPUs here, got 2"
    ):
        World(size=2, local_size=2, is_distributed=True).device("cuda")


def test_a_rank_has_the_gpu_of_its_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr("tritium.train.distributed.world.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert World(rank=3, size=4, local_rank=1, local_size=2, is_distributed=True).device(
        "cuda"
    ) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]


def test_neighbouring_ranks_share_layers_and_read_the_same_rows():
    ranks = [World(rank=rank, size=8, engine="fsdp", tensor_ranks=2) for rank in range(8)]
    assert [world.data_rank for world in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {world.data_ranks for world in ranks} == {4}


@pytest.mark.parametrize(
    ("is_distributed", "count", "says"), [(False, 8, True), (False, 1, False), (True, 8, False)]
)
def test_the_use_of_several_gpus_is_explained(is_distributed, count, says, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    _running._print_unused_gpus(World(is_distributed=is_distributed), TrainConfig.from_options())
    assert ("torchrun --nproc-per-node 8 -m tritium.train" in capsys.readouterr().out) is says

import sys
import types

import pytest
import torch

from tritium.errors import InputError
from tritium.train import execution
from tritium.train.config import TrainConfig
from tritium.train.distributed.engines import FSDP, SingleProcess
from tritium.train.distributed.world import World
from tritium.train.execution import check_attention, compiles_on, resolve
from tritium.train.recipes import recipe

pytestmark = pytest.mark.plain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_single_process_takes_the_whole_batch():
    found = resolve(TrainConfig.from_options(device="cpu", batch_size=32, compile="on"))
    assert found.engine is SingleProcess
    assert (found.device, found.dtype, found.micro_batch) == (CPU, torch.float32, 32)
    assert found.is_compiled


def test_data_ranks_share_the_batch():
    world = World(rank=5, size=8, engine="fsdp", shard_ranks=2, tensor_ranks=2, is_distributed=True)
    options = {"device": "cpu", "batch_size": 32, "n_head": 4}
    assert resolve(TrainConfig.from_options(**options), world).engine is FSDP
    assert resolve(TrainConfig.from_options(**options), world).micro_batch == 8
    options["micro_batch_size"] = 4
    assert resolve(TrainConfig.from_options(**options), world).micro_batch == 4


def test_a_batch_that_ranks_cannot_divide_raises():
    world = World(size=2, engine="ddp", is_distributed=True)
    options = {"device": "cpu", "batch_size": 6, "micro_batch_size": 2}
    with pytest.raises(InputError, match="multiple of 2 ranks times micro-batches of 2, got 6"):
        resolve(TrainConfig.from_options(**options), world)


@pytest.mark.parametrize("options", [{"lora": 2}, {"prefix_tokens": 2}])
def test_adapters_with_tensor_ranks_raise(options):
    world = World(size=2, engine="fsdp", tensor_ranks=2, is_distributed=True)
    config = TrainConfig.from_options(device="cpu", n_head=4, init_from="model", **options)
    with pytest.raises(InputError, match=f"{next(iter(options))}: expected 1 tensor rank, got 2"):
        resolve(config, world)


@pytest.mark.parametrize(
    ("device", "has_triton", "compiles"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_runs_compile_by_default_where_triton_generates_code(
    device, has_triton, compiles, monkeypatch
):
    monkeypatch.setattr(execution, "HAS_TRITON", has_triton)
    assert compiles_on(torch.device(device)) is compiles


def test_flash_attn_needs_its_package_a_gpu_and_16_bits(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(InputError, match="attention: expected an installed flash-attn, found none"):
        check_attention("flash-attn", CUDA, torch.bfloat16)
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    check_attention("flash-attn", CUDA, torch.bfloat16)
    for device, dtype in ((CPU, torch.bfloat16), (CUDA, torch.float32)):
        with pytest.raises(InputError, match=f"16 bits for flash-attn, got {device} and {dtype}"):
            check_attention("flash-attn", device, dtype)
    check_attention("sdpa", CPU, torch.float32)


def test_an_automatic_micro_batch_divides_the_batch_and_fits(monkeypatch):
    def chosen(memory_gb: float, **options) -> int:
        monkeypatch.setattr(
            "tritium.train.execution.device_bytes", lambda device, processes: int(memory_gb * 1e9)
        )
        config = recipe("gpt2").with_options(micro_batch_size="auto", device="cpu", **options)
        return resolve(config).micro_batch

    assert chosen(1000) == 64, "65,536 tokens are enough"
    assert chosen(1000, batch_size=48) == 48
    # By the formula, 24 GB have room for 14 sequences of 1,024 tokens in float32.
    assert 512 % chosen(24) == 0
    assert 2 <= chosen(24) < chosen(80) <= 64
    assert chosen(24, precision="bfloat16") > chosen(24)
    assert chosen(1) == 1, "it does not fit: the run says so when memory is short"
    assert chosen(1000, tokenizer="a-folder") == 64

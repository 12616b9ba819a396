"""One of two processes that train a GPT replicated (DDP) and sharded (FSDP2), run by test_gpt.py as a program of its own."""

import gc
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tritium.model import GPT, GPTConfig

rank, store = int(sys.argv[1]), sys.argv[2]
tokens = torch.randint(90, (4, 24), generator=torch.Generator().manual_seed(1))
mine = tokens[2 * rank : 2 * rank + 2]


def fresh() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=90, context_tokens=24))


alone, sharded = fresh(), fresh()
alone(tokens[:, :-1], tokens[:, 1:]).backward()
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
replicated = DistributedDataParallel(fresh())
for part in (*sharded.h, sharded):
    fully_shard(part)
for model in (replicated, sharded):
    model(mine[:, :-1], mine[:, 1:]).backward()
for one, copy, shard in zip(
    alone.parameters(), replicated.parameters(), sharded.parameters(), strict=True
):
    torch.testing.assert_close(copy.grad, one.grad, rtol=1e-4, atol=1e-6)
    assert shard.grad.to_local().numel() < one.numel()
    torch.testing.assert_close(shard.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-6)
# Before the group that their reducers and hooks use: what a cycle keeps would otherwise go when Python is half torn down.
del model, replicated, sharded, part, copy, shard
gc.collect()
dist.destroy_process_group()

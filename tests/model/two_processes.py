"""One of the two processes that test_gpt.py starts: python two_processes.py RANK STORE_FILE.

It compares the gradients of DDP and FSDP2 over two processes with the gradients of one process.
"""

import gc
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tritium.kernels.embedding import order_of
from tritium.model import GPT, GPTConfig


def new_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=90, context_tokens=24))


rank = int(sys.argv[1])
store = sys.argv[2]
tokens = torch.randint(90, (4, 24), generator=torch.Generator().manual_seed(1))

# one process, all sequences
single = new_model()
single(tokens[:, :-1], tokens[:, 1:]).backward()

# Run the operator of the embedding as on a GPU: it adds to the head's gradient in place.
sys.modules[order_of.__module__]._fwd._composite_if = lambda *_: False

# two processes, two sequences each
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
replicated = DistributedDataParallel(new_model())
sharded = new_model()
for module in (*sharded.h, sharded):
    fully_shard(module)
own = tokens[2 * rank : 2 * rank + 2]
for model in (replicated, sharded):
    model(own[:, :-1], own[:, 1:]).backward()

for expected, copy, shard in zip(
    single.parameters(), replicated.parameters(), sharded.parameters(), strict=True
):
    torch.testing.assert_close(copy.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert shard.grad.to_local().numel() < expected.numel()
    torch.testing.assert_close(shard.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6)

# Free the models before the process group that they use. Reference cycles would otherwise keep
# them until the interpreter exits.
del model, replicated, sharded, module, copy, shard
gc.collect()
dist.destroy_process_group()

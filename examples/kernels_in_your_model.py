"""The kernels of tritium in a model of your own, trained for a few steps.

    python examples/kernels_in_your_model.py [STEPS]

`Model` and its blocks are a small Llama in 60 lines of PyTorch: RoPE, RMS norm, causal attention
with grouped heads, SwiGLU, and a loss that never holds all logits. Optimizer, autocast and
torch.compile are PyTorch's. The model learns the bytes of this file. On a GPU the operators run
Triton kernels, on a CPU their definitions in PyTorch. The output on a CPU is similar to this:

    cpu: 131,392 parameters
    step   0: loss 6.159
    step  25: loss 2.640
    step  50: loss 2.328
    step  75: loss 1.994
    step  99: loss 2.062
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tritium.kernels import (
    add_rms_norm,
    causal_attention,
    linear_cross_entropy,
    rms_norm,
    rotary,
    swiglu_mlp,
)

D, H, G, K, F = 64, 4, 2, 16, 192  # model width, heads, key heads, head size, MLP width


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class Block(nn.Module):
    """Attention and an MLP. `residual` is the sum of all blocks so far, `x` is not added yet."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(D))
        self.norm2 = nn.Parameter(torch.ones(D))
        self.qkv = nn.Linear(D, (H + 2 * G) * K, bias=False)
        self.out = nn.Linear(H * K, D, bias=False)
        self.gate = weight(F, D)
        self.up = weight(F, D)
        self.down = weight(D, F)

    def forward(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor):
        B, T, _ = x.shape
        # The kernel adds the residual and normalizes the sum in one pass.
        x, residual = add_rms_norm(x, residual, self.norm1)
        q, k, v = self.qkv(x).view(B, T, H + 2 * G, K).split((H, G, G), 2)
        o = causal_attention(rotary(q, cos, sin), rotary(k, cos, sin), v)  # (B, T, H, K)
        x, residual = add_rms_norm(self.out(o.flatten(2)), residual, self.norm2)
        return swiglu_mlp(x, self.gate, self.up, self.down), residual


class Model(nn.Module):
    def __init__(self, vocab_size: int, context: int, n_layer: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, D)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.norm = nn.Parameter(torch.ones(D))
        self.head = weight(vocab_size, D)
        angle = torch.arange(context)[:, None] * 10_000.0 ** (-torch.arange(K // 2) * 2 / K)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the mean loss, or the logits if there are no targets."""
        x = self.embedding(tokens)
        residual = torch.zeros_like(x)
        for block in self.blocks:
            x, residual = block(x, residual, self.cos, self.sin)
        x = rms_norm(x + residual, self.norm)
        if targets is None:
            return x @ self.head.T
        return linear_cross_entropy(x, self.head, targets)


def main(steps: int = 100) -> list[float]:
    """Train for some steps. Returns: the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.tensor(list(Path(__file__).read_bytes()), device=device)
    model = Model(vocab_size=256, context=64).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(f"{device}: {sum(p.numel() for p in model.parameters()):,} parameters")

    losses = []
    for step in range(steps):
        start = torch.randint(len(text) - 65, (8, 1), device=device)
        window = text[start + torch.arange(65, device=device)]  # (8, 65)
        loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

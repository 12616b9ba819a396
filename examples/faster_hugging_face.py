"""A Hugging Face GPT-2 with the kernels of tritium: the same loss, gradients and text.

    python examples/faster_hugging_face.py [FOLDER]

FOLDER is a GPT-2 or Llama in the Hugging Face format. By default the model is a small GPT-2 with
random weights. `patch` replaces attention, norms, MLPs and the loss; `unpatch` undoes it. The
program prints the time of a training step with and without the patch. Expect a gain on a GPU only:
on a CPU the operators run their definitions in PyTorch. The output on one core of an AMD EPYC that
other programs used too:

    transformers: loss 6.91528, gradient norm of the embedding 0.86874, 217.8 ms per step on cpu
    with tritium: loss 6.91528, gradient norm of the embedding 0.86874, 296.0 ms per step on cpu
    the same text: True
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tritium.kernels.integrations.transformers import patch, unpatch

SMALL = {
    **{"n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 1_000},
    **{"bos_token_id": 0, "eos_token_id": 0},
    # A kernel draws other random numbers for dropout, so the losses would differ.
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def seconds_per_step(model: torch.nn.Module, tokens: torch.Tensor, steps: int = 3) -> float:
    """Return the mean time of forward and backward, after a step that warms up."""
    on_cuda = tokens.device.type == "cuda"
    for step in range(steps + 1):
        model(tokens, labels=tokens).loss.backward()
        if on_cuda:
            torch.cuda.synchronize()
        if step == 0:
            began = time.perf_counter()
    return (time.perf_counter() - began) / steps


def measure(model: torch.nn.Module, tokens: torch.Tensor) -> dict:
    """Return the loss, a gradient, a text and the speed of a model."""
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    embedding = model.get_input_embeddings().weight
    gradient = embedding.grad.norm().item()
    seconds = seconds_per_step(model, tokens)
    model.eval()
    text = model.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.train()
    return {"loss": loss.item(), "gradient": gradient, "text": text.tolist(), "seconds": seconds}


def main(folder: str | None = None, batch: int = 4, context: int = 64) -> list[dict]:
    """Measure a model without and with the kernels. Returns: both results."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if folder is None:
        model = GPT2LMHeadModel(GPT2Config(**SMALL, n_positions=context))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    model = model.to(device).train()
    tokens = torch.randint(model.config.vocab_size, (batch, context), device=device)

    results = []
    for name in ("transformers", "with tritium"):
        if name == "with tritium":
            patch(model)
        found = measure(model, tokens)
        results.append(found)
        print(
            f"{name}: loss {found['loss']:.5f}, gradient norm of the embedding "
            f"{found['gradient']:.5f}, {1e3 * found['seconds']:.1f} ms per step on {device}"
        )
    print(f"the same text: {results[0]['text'] == results[1]['text']}")
    unpatch(model)  # the model is what it was
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])

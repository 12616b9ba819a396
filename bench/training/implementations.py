"""Who takes part in `tritium bench train`: models that train on the same batches from the same weights.

tritium     tritium's model, also with other attentions, in train/trainer.py's step
baseline    plain PyTorch (baseline.py) in the same step: same precision, optimizer, clipping
nanoGPT     a checkout's model.py in the step of its train.py: autocast, its own groups of AdamW, clip_grad_norm_
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...model import GPT, GPTConfig
from ...model.attention import ATTENTIONS
from ...train.config import TrainConfig
from ...train.data.loader import Batch
from ...train.execution import check_attention
from ...train.precision import choose_dtype
from ...train.schedule import learning_rate
from ...train.trainer import single_trainer
from .baseline import Baseline


class Contestant:
    """A model, trained as train/loop.py trains: by the same Trainer.

    Attributes: kind: without how it is compiled.   losses: of each step so far, on the device.
    """

    def __init__(self, kind: str, model: nn.Module, config: TrainConfig, *, compiled: bool):
        self.kind, self.model, self.compiled, self.losses, self._config = (
            kind,
            model,
            compiled,
            [],
            config,
        )
        self.name, self.shape = kind, model.config
        self.trainer = single_trainer(
            model, config.with_options(compile="on" if compiled else "off")
        )

    def step(self, batch: Batch) -> None:
        """Train one step."""
        lr = learning_rate(self._config, len(self.losses))
        self.losses.append(self.trainer.backward(batch))
        self.trainer.update(lr)

    def gradients(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and its gradients by tritium's names, in float16 scaled up; none are left on the parameters."""
        loss = self.trainer.backward(batch)
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return loss, gradients

    def held_bytes(self) -> int:
        """Weights, their copies and optimizer state: what stays allocated while another one runs."""
        state = [
            value
            for values in self.trainer.optimizer.states().values()
            for value in values.values()
        ]
        return sum(
            value.nbytes
            for value in {*self.model.parameters(), *self.trainer.working.parameters(), *state}
        )


class NanoGPT(Contestant):
    """The model of a nanoGPT checkout, trained as its train.py does.

    Args:
        source: its model.py, imported.
        weights: tritium's, whose names and layout it shares.
    """

    def __init__(
        self, source: ModuleType, shape: GPTConfig, weights: dict[str, Tensor], config: TrainConfig, device: torch.device, *,
        compiled: bool,
    ):  # fmt: skip
        self.kind = self.name = "nanoGPT"
        self.shape, self.compiled, self.losses, self._config = shape, compiled, [], config
        sizes = {
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.d_model,
            "block_size": shape.context_tokens,
        }
        theirs = source.GPTConfig(
            **sizes, vocab_size=shape.vocab_size, dropout=0.0, bias=shape.bias
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it counts its parameters aloud
            self.model = source.GPT(theirs)
            named = {f"transformer.{name}": value for name, value in weights.items()}
            self.model.load_state_dict(named | {"lm_head.weight": weights["wte.weight"]})
            self.model.to(device)
            betas = (config.beta1, config.beta2)
            self._optimizer = self.model.configure_optimizers(
                config.weight_decay, config.lr, betas, device.type
            )
        dtype = choose_dtype(config.execution.precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._cast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        self._network = torch.compile(self.model) if compiled else self.model

    def step(self, batch: Batch) -> None:
        """Train one step."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, len(self.losses))
        self.losses.append(self._backward(self._network, batch))
        if self._config.grad_clip:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.grad_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As Contestant's, uncompiled, and with the tanh form of GELU, which is not nanoGPT's."""
        gelus = [module for module in self.model.modules() if isinstance(module, nn.GELU)]
        for gelu in gelus:
            gelu.approximate = "tanh"
        loss = self._backward(self.model, batch)
        for gelu in gelus:
            gelu.approximate = "none"
        named = self.model.named_parameters()
        gradients = {name.removeprefix("transformer."): parameter.grad for name, parameter in named}
        self.model.zero_grad(set_to_none=True)
        return loss, gradients

    def held_bytes(self) -> int:
        """As Contestant's: its copies in 16 bits are made and dropped in each step."""
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        return sum(value.nbytes for value in {*self.model.parameters(), *state})

    def _backward(self, network: Callable, batch: Batch) -> Tensor:
        with self._cast:
            _, loss = network(*batch.on(next(self.model.parameters()).device))
        self._scaler.scale(loss).backward()
        return loss.detach()


def chosen_attentions(
    config: TrainConfig, asked: Sequence[str] | None, device: torch.device
) -> list[str]:
    """Those beside ours; None asks for all that can run on CUDA. Raises: InputError for one asked for that cannot run here."""
    default, chosen = list(ATTENTIONS)[1:] if device.type == "cuda" else [], []
    for name in dict.fromkeys(default if asked is None else asked):
        with contextlib.suppress(InputError) if asked is None else contextlib.nullcontext():
            check_attention(name, device, choose_dtype(config.execution.precision, device))
            chosen.append(name)
    return chosen


def make_contestants(
    config: TrainConfig, shape: GPTConfig, device: torch.device, compiled: Sequence[bool],
    attentions: Sequence[str] = (), nanogpt: ModuleType | None = None,
) -> list[Contestant]:  # fmt: skip
    """Tritium's model, the same with each of the other attentions, nanoGPT and the baseline, with the same weights.

    Args:
        compiled: ways in which each takes part; where there are two, the compiled ones are so named.
        nanogpt: as checkout_model gives it.
    """
    torch.manual_seed(config.seed)
    weights = GPT(shape).state_dict()
    makers = {"tritium": lambda: GPT(shape)}
    makers |= {
        f"tritium, {name}": lambda name=name: GPT(shape, attention=name) for name in attentions
    }
    contestants = []
    for way in compiled:
        for kind, make in {**makers, "baseline": lambda: Baseline(shape)}.items():
            model = make()
            model.load_state_dict(weights)
            contestants.append(Contestant(kind, model.to(device), config, compiled=way))
        if nanogpt is not None:
            contestants.append(NanoGPT(nanogpt, shape, weights, config, device, compiled=way))
    for contestant in contestants if len(compiled) > 1 else ():
        contestant.name += ", compiled" * contestant.compiled
    return contestants


def checkout_model(checkout: Path) -> ModuleType:
    """The model.py of a nanoGPT checkout. Raises: InputError if there is none; another model.py is not run."""
    file = checkout / "model.py"
    if not file.is_file() or b"class GPTConfig" not in file.read_bytes():
        raise InputError(
            f"--nanogpt: expected a nanoGPT checkout with model.py, found none in {checkout}"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_shape(shape: GPTConfig) -> GPTConfig:
    """The shape with a vocabulary that needs no padding, which nanoGPT has not. Raises: InputError if it has no such model."""
    plain = GPTConfig(
        n_layer=shape.n_layer, n_head=shape.n_head, d_model=shape.d_model, vocab_size=shape.padded_vocab_size,
        context_tokens=shape.context_tokens, bias=shape.bias, n_kv_head=shape.n_kv_head and shape.n_head,
    )  # fmt: skip
    if replace(shape, vocab_size=plain.vocab_size) != plain:
        raise InputError(
            "--nanogpt: expected a recipe with GPT-2's own positions, norms, heads and perceptron; leave it out"
        )
    return plain

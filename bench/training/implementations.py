"""The models that `tritium bench train` compares. All train on the same batches from equal weights.

tritium     tritium's model, also with other attentions, trained by train/trainer.py
baseline    plain PyTorch (baseline.py), trained the same way: same precision, optimizer, clipping
nanoGPT     the model.py of a checkout, trained like its train.py: autocast, its own AdamW groups,
            clip_grad_norm_
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
from ...model.choices import ATTENTIONS
from ...train.config import TrainConfig
from ...train.data.loader import Batch
from ...train.execution import check_attention
from ...train.precision import choose_dtype
from ...train.schedule import learning_rate
from ...train.trainer import single_trainer
from .baseline import Baseline


class TrainedModel:
    """A model and its training step: that of tritium's Trainer.

    Attributes:
        kind: "tritium", "tritium, ATTENTION", "baseline" or "nanoGPT".
        name: kind, with ", compiled" if both are compared.
        losses: loss of each step so far, on the device.
    """

    def __init__(self, kind: str, model: nn.Module, config: TrainConfig, *, compiled: bool):
        self.kind = self.name = kind
        self.model = model
        self.shape: GPTConfig = model.config
        self.compiled = compiled
        self.losses: list[Tensor] = []
        self._config = config
        compile_option = config.with_options(compile="on" if compiled else "off")
        self.trainer = single_trainer(model, compile_option)

    def step(self, batch: Batch) -> None:
        """Train one step."""
        lr = learning_rate(self._config, len(self.losses))
        self.losses.append(self.trainer.backward(batch))
        self.trainer.update(lr)

    def gradients(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its gradients by tritium's parameter names.

        In float16 the gradients are scaled. The parameters keep no gradient.
        """
        loss = self.trainer.backward(batch)
        named = self.model.named_parameters()
        # Clones, because the trainer may write to the same tensors again.
        gradients = {name: parameter.grad.clone() for name, parameter in named}
        self.model.zero_grad(set_to_none=True)
        return loss, gradients

    def held_bytes(self) -> int:
        """Return the bytes that stay allocated between steps.

        Weights, copies and optimizer state; with a CUDA graph also gradients.
        """
        optimizer_states = self.trainer.optimizer.states().values()
        state = [value for values in optimizer_states for value in values.values()]
        weights = {*self.model.parameters(), *self.trainer.working.parameters()}
        gradients = self.trainer.kept_gradients
        return sum(value.nbytes for value in {*weights, *state, *gradients})


class NanoGPT(TrainedModel):
    """The model of a nanoGPT checkout, trained like its train.py.

    Args:
        source: the model.py of the checkout, imported.
        weights: tritium's weights. nanoGPT has the same names and layouts.
    """

    def __init__(
        self,
        source: ModuleType,
        shape: GPTConfig,
        weights: dict[str, Tensor],
        config: TrainConfig,
        device: torch.device,
        *,
        compiled: bool,
    ):
        self.kind = self.name = "nanoGPT"
        self.shape = shape
        self.compiled = compiled
        self.losses = []
        self._config = config
        nanogpt_config = source.GPTConfig(
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.d_model,
            block_size=shape.context_tokens,
            vocab_size=shape.vocab_size,
            dropout=0.0,
            bias=shape.bias,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
            self.model = source.GPT(nanogpt_config)
            renamed = {f"transformer.{name}": value for name, value in weights.items()}
            self.model.load_state_dict(renamed | {"lm_head.weight": weights["wte.weight"]})
            self.model.to(device)
            self._optimizer = self.model.configure_optimizers(
                config.weight_decay, config.lr, (config.beta1, config.beta2), device.type
            )
        dtype = choose_dtype(config.execution.precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        self._network = torch.compile(self.model) if compiled else self.model

    def step(self, batch: Batch) -> None:
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
        """Return loss and gradients, uncompiled and with the GELU of the shape.

        Training uses nanoGPT's exact GELU.
        """
        gelus = [module for module in self.model.modules() if isinstance(module, nn.GELU)]
        for gelu in gelus:
            gelu.approximate = "tanh" if self.shape.mlp == "gelu" else "none"
        loss = self._backward(self.model, batch)
        for gelu in gelus:
            gelu.approximate = "none"
        named = self.model.named_parameters()
        gradients = {name.removeprefix("transformer."): parameter.grad for name, parameter in named}
        self.model.zero_grad(set_to_none=True)
        return loss, gradients

    def held_bytes(self) -> int:
        # Autocast frees its 16-bit copies in each step.
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        return sum(value.nbytes for value in {*self.model.parameters(), *state})

    def _backward(self, network: Callable, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        micro_batch = self._config.micro_batch
        starts = range(0, len(batch), micro_batch)
        total = torch.zeros((), device=device)
        for start in starts:
            with self._autocast:
                _, loss = network(*batch[start : start + micro_batch].on(device))
                loss = loss / len(starts)
            self._scaler.scale(loss).backward()
            total += loss.detach()
        return total


def choose_attentions(
    config: TrainConfig, names: Sequence[str] | None, device: torch.device
) -> list[str]:
    """Return the attentions to compare with tritium's own.

    Args:
        names: attentions; None for all that run here on CUDA, and for none on a CPU.
    Raises: InputError if a named one cannot run here.
    """
    dtype = choose_dtype(config.execution.precision, device)
    wanted = names
    if names is None:
        wanted = [name for name in ATTENTIONS if name != "tritium" and device.type == "cuda"]
    chosen = []
    for name in dict.fromkeys(wanted):
        try:
            check_attention(name, device, dtype)
        except InputError:
            if names is not None:
                raise
            continue
        chosen.append(name)
    return chosen


def make_implementations(
    config: TrainConfig,
    shape: GPTConfig,
    device: torch.device,
    compiled: Sequence[bool],
    attentions: Sequence[str] = (),
    nanogpt: ModuleType | None = None,
) -> list[TrainedModel]:
    """Make the models that are compared, with equal weights.

    Args:
        compiled: [False], [True], or both to make each model twice.
        attentions: other attentions for tritium's model.
        nanogpt: the module of import_nanogpt.
    Returns: tritium first, then other attentions, the baseline and nanoGPT.
    """
    torch.manual_seed(config.seed)
    weights = GPT(shape).state_dict()
    constructors: dict[str, Callable[[], nn.Module]] = {"tritium": lambda: GPT(shape)}
    for attention in attentions:
        constructors[f"tritium, {attention}"] = lambda a=attention: GPT(shape, attention=a)
    constructors["baseline"] = lambda: Baseline(shape)

    implementations = []
    for is_compiled in compiled:
        for kind, construct in constructors.items():
            model = construct()
            model.load_state_dict(weights)
            trained = TrainedModel(kind, model.to(device), config, compiled=is_compiled)
            implementations.append(trained)
        if nanogpt is not None:
            trained = NanoGPT(nanogpt, shape, weights, config, device, compiled=is_compiled)
            implementations.append(trained)
    if len(compiled) > 1:
        for one in implementations:
            one.name += ", compiled" if one.compiled else ""
    return implementations


def import_nanogpt(checkout: Path) -> ModuleType:
    """Import the model.py of a nanoGPT checkout.

    Raises: InputError if there is none. Another project's model.py is not run.
    """
    file = checkout / "model.py"
    if not file.is_file() or b"class GPTConfig" not in file.read_bytes():
        raise InputError(
            f"nanogpt: expected a nanoGPT checkout with model.py, found none in {checkout}"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_shape(shape: GPTConfig) -> GPTConfig:
    """Return the shape with a vocabulary that needs no padding: nanoGPT does not pad.

    nanoGPT always trains with exact GELU. For a shape with the tanh form, which is slower on a CPU,
    the two programs do not do equal work.

    Raises: InputError if nanoGPT has no such architecture.
    """
    plain = GPTConfig(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        d_model=shape.d_model,
        vocab_size=shape.padded_vocab_size,
        context_tokens=shape.context_tokens,
        bias=shape.bias,
        n_kv_head=shape.n_kv_head and shape.n_head,
        mlp="gelu" if shape.mlp == "gelu" else "gelu_exact",
    )
    if replace(shape, vocab_size=plain.vocab_size) != plain:
        raise InputError(
            "nanogpt: expected a recipe with the positions, norms, heads and MLP of GPT-2, "
            "got another architecture; leave the option out"
        )
    return plain

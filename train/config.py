"""The typed configuration of a run."""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..model import GPTConfig
from ..model.recompute import check_recompute

DIVERGED = "training diverged: give a lower --lr, more --warmup-steps or a --grad-clip"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. Each field is an option of `tritium train`; recipes.py holds filled-in rows."""

    data: tuple[str, ...] = ("stdlib",)
    """What to learn: a dataset of `tritium data build`, files, folders, stdlib or python."""
    tokenizer: str | None = None
    """bytes, chars, gpt2, FILE.tiktoken or bpe:SIZE; a dataset has its own."""
    held_out: float = 0.1
    """Share of the text kept for validation, where a dataset is built."""
    out: str | None = None
    """Folder of the run; default: the next free runs/RECIPE-N."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps ...; auto: CUDA if there is one, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of products; weights and optimizer stay float32. auto: bfloat16 on CUDA, float16 on GPUs without it, else float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile makes one graph of model and loss. auto: on CUDA."""
    attention: Literal["tritium", "sdpa", "flash-attn"] = "tritium"
    """Whose attention the model trains with: ours, PyTorch's, or the package flash-attn's, on CUDA in 16 bits."""
    recompute: Literal["none", "gelu", "selective", "block"] = "none"
    """What the backward computes again, to save memory: GELU, blocks without attention, or whole blocks."""
    seed: int = 1337
    """Of initial weights, order of the data and samples."""

    n_layer: int = 4
    """Blocks."""
    n_head: int = 4
    """Query heads a block."""
    d_model: int = 256
    """Width of the residual stream."""
    n_kv_head: int | None = None
    """Key and value heads a block; default: n_head."""
    bias: bool = True
    """Biases of linear maps and layer norms."""
    position: Literal["learned", "rotary"] = "learned"
    """Positions: a learned vector each, or queries and keys turned by them."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm or root-mean-square norm."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Perceptron with GELU, or gated."""
    context_tokens: int = 256
    """Tokens a sequence."""
    document_mask: bool = False
    """Documents that share a sequence do not see one another: attention and positions begin anew at each end-of-text."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step."""
    micro_batch_size: int | None = None
    """Sequences at once; gradients add up to batch_size. Default: batch_size."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: cosine to min_lr; constant; wsd: constant, then linear to min_lr over the last fifth."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of blocks, AdamW for all else, at the same learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay, of matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    eval_interval: int = 250
    """Steps between evaluations; the last step always has one, over all held-out text."""
    eval_tokens: int = 32_768
    """Held-out tokens of the evaluations before the last, spread evenly over all of them."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    prompt: str = ""
    """Start of the samples written at each evaluation; default: the start of a document."""
    sample_tokens: int = 200
    """Tokens of a sample."""

    profile: int = 0
    """Steps, after the first 10, whose time goes to RUN/profile: a trace for Perfetto and a table of operators."""
    wandb: str | None = None
    """Project of Weights & Biases that gets what metrics.jsonl gets."""
    tensorboard: bool = False
    """Whether RUN/tensorboard gets it too."""

    def __post_init__(self):
        if not self.data:
            raise InputError(
                "--data: expected files, folders, a dataset, stdlib or python, got none"
            )
        least = {
            "steps": 1,
            "batch_size": 1,
            "eval_interval": 1,
            "checkpoint_interval": 1,
            "keep_checkpoints": 1,
        }
        least |= {"eval_tokens": 1, "warmup_steps": 0, "sample_tokens": 0}
        least |= {"lr": 0, "min_lr": 0, "weight_decay": 0, "grad_clip": 0, "profile": 0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise InputError(
                    f"--{_dashed(name)}: expected {bound} or more, and finite, got {getattr(self, name)}"
                )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed: expected a number from 0 to 2**63 - 1, got {self.seed}")
        for name in ("beta1", "beta2", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"--{_dashed(name)}: expected a number in [0, 1), got {getattr(self, name)}"
                )
        micro = self.micro_batch
        if micro < 1 or self.batch_size % micro:
            raise InputError(
                f"--micro-batch-size: expected a divisor of the batch size {self.batch_size}, got {micro}"
            )
        self.gpt(vocab_size=1)

    @property
    def micro_batch(self) -> int:
        """Sequences at once."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    def gpt(self, vocab_size: int) -> GPTConfig:
        """The model's shape for a vocabulary. Raises: InputError if the sizes do not fit together."""
        names = (
            "n_layer",
            "n_head",
            "d_model",
            "n_kv_head",
            "bias",
            "position",
            "norm",
            "mlp",
            "context_tokens",
        )
        try:
            config = GPTConfig(
                vocab_size=vocab_size, **{name: getattr(self, name) for name in names}
            )
            check_recompute(self.recompute, config)
            return config
        except ValueError as error:
            raise InputError(f"model: {str(error).removeprefix('GPTConfig: ')}") from None


def _dashed(name: str) -> str:
    return name.replace("_", "-")

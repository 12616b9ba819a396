"""The commands of bench/device.sh: the programs that each of them runs, and for how long."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import ROOT

TOTAL_SECONDS = 535
SHORT_SECONDS = 430
# Every kernel once, in float32 and bfloat16.
KERNEL_TESTS = "(accura or bits or packed_documents or last_rows) and not fp16"
# Captures in CUDA graphs, and operators that are called without the dispatcher.
GRAPH_TESTS = (
    "tests/train/machine/test_cuda_graph.py tests/kernels/test_operators.py "
    "tests/kernels/core/test_op.py tests/model/generation/test_decoder.py"
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program of a command.

    Attributes:
        name: of its log, NAME.log.
        words: its arguments. FOLDER stands for the folder of the command's files, PYTHON for this
            Python.
        until: its deadline, seconds after the start of the command.
        program: the program, if it is not Python.
        together: whether to run at the same time as the part before. Such parts are not timed.
    """

    name: str
    words: tuple[str, ...]
    until: int
    program: str | None = None
    together: bool = False


def _part(name: str, until: int, words: str, *more: str, program: str | None = None) -> Part:
    return Part(name=name, words=(*words.split(), *more), until=until, program=program)


def _tritium(name: str, until: int, words: str) -> Part:
    return _part(name, until, f"-m tritium {words}")


def _pytest(name: str, until: int, workers: int, words: str, *more: str) -> Part:
    return _part(name, until, f"-m pytest -p no:cacheprovider -n {workers} -rfE {words}", *more)


# --- the commands


def correct(rehearse: bool) -> list[Part]:
    """Return the parts that show whether everything works, before anything is timed."""
    if rehearse:
        tests = _pytest("tests", 500, 0, "tests/kernels/norm/test_layer_norm.py -k", "plan or cost")
        machine = "shakespeare-char --device cpu --micro-batch-size 1"
        run = (
            "shakespeare-char --data train --tokenizer bytes --device cpu --steps 2 --n-layer 1 "
            "--eval-tokens 64 --sample-tokens 2"
        )
    else:
        tests = _pytest("tests", 400, 14, "tests/kernels -m", "not codegen", "-k", KERNEL_TESTS)
        machine = "gpt2 --micro-batch-size 8"
        run = (
            "gpt2 --data stdlib --tokenizer bytes --steps 20 --batch-size 32 --eval-interval 20 "
            "--eval-tokens 65536 --compile off"
        )
    return [
        _tritium("info", 30, "info"),
        _tritium("machine", 180, f"bench machine {machine} --out FOLDER/machine.json"),
        tests,
        _tritium("run", TOTAL_SECONDS, f"train {run} --out FOLDER/run"),
    ]


def train(rehearse: bool) -> list[Part]:
    """Return the parts that measure training, and compare a profile with the prediction."""
    if rehearse:
        tiny = "shakespeare-char --device cpu --steps 1 --micro-batch-size 1"
        return [
            _tritium("train", 400, f"bench train {tiny} --out FOLDER/train.json"),
            _tritium(
                "profile",
                TOTAL_SECONDS,
                "bench predict shakespeare-char --batch-size 2 --measure 1 "
                "--out FOLDER/profile.json",
            ),
        ]
    # Only tritium's own attention: each further attention is one more model to compile.
    models = f"bench train gpt2 --attention{_nanogpt()} --steps 60"
    return [
        _tritium("train-32", 250, f"{models} --micro-batch-size 32 --out FOLDER/train-32.json"),
        _tritium(
            "profile",
            360,
            "bench predict gpt2 --batch-size 64 --micro-batch-size 64 --measure 5 "
            "--out FOLDER/profile.json",
        ),
        # A step of about half a million tokens, as in the recipe. Last, and without nanoGPT, whose
        # logits may not fit into the memory of an H100.
        _tritium(
            "train-512",
            TOTAL_SECONDS,
            "bench train gpt2 --attention --batch-size 512 --micro-batch-size 64 --steps 10 "
            "--out FOLDER/train-512.json",
        ),
    ]


# Operators, and the shapes at which they are timed: GPT-2 124M with 64 sequences, other widths and
# longer sequences. No shapes: the operators' own.
KERNEL_SHAPES = (
    ("causal_attention", "64x1024x12x64 16x4096x12x64 4x8192x12x64"),
    ("cross_entropy", "8192x50304"),
    ("linear_cross_entropy", "16384x768x50304 65536x768x50304"),
    ("layer_norm add_layer_norm", "32768x1024"),
    ("gelu_mlp", "65536x768 32768x1600"),
    ("causal_attention_qkvpacked:norm_rope", ""),
    ("embedding", "64x1024x768x50304"),
    ("rms_norm add_rms_norm rotary causal_attention_varlen attention_decode swiglu swiglu_mlp", ""),
)


def kernels(rehearse: bool) -> list[Part]:
    """Return the parts that time operators at a few shapes, without torch.compile."""
    rows = (("layer_norm", "8x64"),) if rehearse else KERNEL_SHAPES
    options = "--without torch.compile" + " --device cpu --rounds 2" * rehearse
    parts = []
    for number, (operators, shapes) in enumerate(rows, start=1):
        name = operators.split()[0]
        shape = f"--shape {shapes}" if shapes else ""
        parts.append(
            _tritium(
                name,
                number * TOTAL_SECONDS // len(rows),
                f"bench kernels {operators} {shape} {options} --out FOLDER/{name}",
            )
        )
    return parts


# Operator, its shapes, the variants to compare, and the deadline. No variants: all.
TUNED = (
    ("causal_attention", "64x1024x12x64", "", 220),
    ("linear_cross_entropy", "65536x768x50257", "", 360),
    ("cross_entropy", "8192x50304", "", 420),
    ("layer_norm", "65536x768 32768x1024", "", 450),
    ("embedding", "64x1024x768x50304", "", 480),
    ("gelu_mlp", "65536x768", "cublas", TOTAL_SECONDS),
)


def tune(rehearse: bool) -> list[Part]:
    """Return the parts that compare launch sizes."""
    rows = (("layer_norm", "8x64", "", TOTAL_SECONDS),) if rehearse else TUNED
    options = " --device cpu --rounds 1" * rehearse
    parts = []
    for operator, shapes, variants, until in rows:
        variant = f"--variant {variants}" if variants else ""
        words = f"--shape {shapes} {variant}{options} --out FOLDER/{operator}.json"
        parts.append(_tritium(operator, until, f"bench tune {operator} {words}"))
    return parts


def later(rehearse: bool) -> list[Part]:
    """Return the parts that can wait: all tests, a race detector, torch.compile's kernels."""
    if rehearse:
        return [_pytest("tests", TOTAL_SECONDS, 0, "tests/kernels/test_rotary.py -k", "plan")]
    race = "--tool racecheck --error-exitcode 1 PYTHON -m pytest -p no:cacheprovider -x"
    some = "accura and bf16 and (layer_norm or rotary or cross_entropy)"
    return [
        _pytest("tests", 300, 14, "tests/kernels -m", "not codegen"),
        _part("races", 400, f"{race} tests/kernels -k", some, program="compute-sanitizer"),
        _tritium(
            "compiled",
            TOTAL_SECONDS,
            "bench kernels layer_norm gelu_mlp cross_entropy --out FOLDER/compiled",
        ),
    ]


def models(rehearse: bool) -> list[Part]:
    """Return the parts that measure other models than GPT-2 124M, and variants of LayerNorm.

    The first parts run at the same time. They test the kernels and CUDA graphs, and they compile
    what the later parts time, so that those find it in the caches. The parts of
    shakespeare-char-gpu need a nanoGPT checkout in .nanogpt, with its text in
    data/shakespeare_char. Models larger than 124M run without torch.compile, which would take
    minutes, and without CUDA graphs.
    """
    if rehearse:
        words = "bench train shakespeare-char --device cpu --steps 1 --micro-batch-size 1"
        return _rehearsal_with_caches("shakespeare", words)
    shakespeare = f"bench train shakespeare-char-gpu --attention{_nanogpt()}"
    run = "train shakespeare-char-gpu --data .nanogpt/data/shakespeare_char/input.txt"
    norms = "bench tune layer_norm --shape 65536x768 32768x1024"
    # Several micro-batches per step, so that the optimizer takes a smaller part of it. In the
    # recipes a step has 512 sequences. tritium and the baseline together need about 100 GB, an
    # estimate. With CUDA graphs each of them would keep the memory of its activations.
    rows = (("gpt2-medium", 32, 64), ("gpt2-large", 32, 64), ("gpt2-xl", 16, 64))
    together = [
        _pytest("tests", 215, 9, "tests/kernels -m", "not codegen", "-k", KERNEL_TESTS),
        _pytest("graphs", 215, 4, f"{GRAPH_TESTS} -k", "cuda or captured or direct or graph"),
        _tritium("fill-shakespeare", 215, f"{shakespeare} --steps 1"),
        _tritium("fill-run", 215, f"{run} --steps 20 --eval-interval 10 --out FOLDER/fill"),
    ]
    return [
        _tritium("info", 30, "info"),
        *(replace(part, together=True) for part in together),
        _tritium("shakespeare", 245, f"{shakespeare} --out FOLDER/shakespeare.json"),
        _tritium(
            "shakespeare-without-graph",
            275,
            f"{shakespeare} --cuda-graph off --out FOLDER/shakespeare-without-graph.json",
        ),
        _tritium("shakespeare-run", 330, f"{run} --out FOLDER/run"),
        _tritium("layer_norm", 360, f"{norms} --out FOLDER/layer_norm.json"),
        *(
            _tritium(
                name,
                until,
                f"bench train {name} --attention --micro-batch-size {micro_batch} --batch-size "
                f"{batch_size} --steps 4 --compile off --cuda-graph off --out FOLDER/{name}.json",
            )
            for until, (name, micro_batch, batch_size) in zip((390, 455, 535), rows, strict=True)
        ),
    ]


def short(rehearse: bool) -> list[Part]:
    """Return the parts that decide most, in seven minutes.

    The first parts run at the same time. They test the kernels and CUDA graphs, and they compile
    what the later parts time, so that those find it in the caches.
    """
    if rehearse:
        words = "bench tune layer_norm --shape 8x64 --device cpu --rounds 1"
        return _rehearsal_with_caches("layer_norm", words)
    models = "bench train gpt2 --attention"
    models_32 = f"{models}{_nanogpt()} --micro-batch-size 32"
    run = "train gpt2 --data stdlib --tokenizer bytes --eval-tokens 65536"
    graphs = "tests/train/machine/test_cuda_graph.py tests/train/test_trainer.py"
    together = [
        _pytest("tests", 215, 9, "tests/kernels -m", "not codegen", "-k", KERNEL_TESTS),
        _pytest("graphs", 215, 3, graphs),
        _tritium("fill-train", 215, f"{models_32} --steps 1 --cuda-graph off"),
        _tritium("fill-run", 215, f"{run} --steps 12 --batch-size 128 --out FOLDER/fill"),
    ]
    return [
        _tritium("info", 30, "info"),
        *(replace(part, together=True) for part in together),
        _tritium(
            "machine", 235, "bench machine gpt2 --micro-batch-size 32 --out FOLDER/machine.json"
        ),
        _tritium("train-32", 290, f"{models_32} --steps 60 --out FOLDER/train-32.json"),
        _tritium(
            "train-32-without-graph",
            335,
            f"{models_32} --steps 60 --cuda-graph off --out FOLDER/train-32-without-graph.json",
        ),
        _tritium(
            "run",
            370,
            f"{run} --steps 120 --batch-size 128 --micro-batch-size 128 --out FOLDER/run",
        ),
        _tritium(
            "train-64",
            SHORT_SECONDS,
            f"{models} --micro-batch-size 64 --steps 40 --out FOLDER/train-64.json",
        ),
    ]


def _rehearsal_with_caches(name: str, words: str) -> list[Part]:
    """Return a part that is run twice: first to fill the caches, beside another part."""
    return [
        _tritium("info", 30, "info"),
        replace(_tritium("fill", 60, words), together=True),
        _tritium(name, SHORT_SECONDS, f"{words} --out FOLDER/{name}.json"),
    ]


def _nanogpt() -> str:
    """Return the option with which a nanoGPT checkout takes part, if one was copied here."""
    return " --nanogpt .nanogpt" if (ROOT / ".nanogpt").is_dir() else ""


COMMANDS: dict[str, Callable[[bool], list[Part]]] = {
    "short": short,
    "models": models,
    "correct": correct,
    "train": train,
    "kernels": kernels,
    "tune": tune,
    "later": later,
}

"""The training loop, from a configuration to a trained model, top to bottom.

A run is a folder: config.json (all that is needed to repeat it), tokenizer.json, metrics.jsonl, samples.txt, loss.png,
checkpoints/step-N. On one CPU a resumed run has bitwise the weights of one that was never stopped.
"""

import gc
import itertools
import shutil
import signal
from pathlib import Path

import torch

from ..model import GPT
from ..model.cost import flops_per_token
from .checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from .config import InputError, TrainConfig
from .data import Dataset, Loader, cache_dir, evaluation_batches, open_dataset, prepare
from .device import choose_device, choose_matmul, keep_freed_memory
from .evaluate import Evaluation, evaluate
from .log import Metrics, console, plot_loss
from .optim import Optimizer, refuse_missing_optimizer
from .precision import refuse_missing_attention
from .profile import profiled, refuse_no_room
from .run import claim_folder, read_run, refuse_used_folder
from .schedule import learning_rate
from .trackers import open_trackers, refuse_missing_trackers
from .trainer import Trainer, quiet_collector


class InterruptedRun(Exception):  # noqa: N818 - it is no error
    """The run was stopped by a signal, after writing a checkpoint. Its argument is the run's folder."""


def start(config: TrainConfig, run: Path) -> Evaluation:
    """Train a new model into the folder `run`.

    Returns: the evaluation of the finished model on all held-out text.
    Raises: InputError for a folder in use, bad data or a training that diverges; InterruptedRun after SIGINT or SIGTERM.
    """
    refuse_used_folder(run)
    _refuse_missing(config)
    refuse_no_room(config)
    dataset = open_dataset(prepare(config.data, config.tokenizer, cache_dir() / "datasets", held_out=config.held_out))
    # What only an evaluation would find out, found out now.
    dataset.tokenizer.encode(config.prompt)
    next(evaluation_batches(dataset.val, context_tokens=config.context_tokens, batch_size=1, max_tokens=1))
    Loader(dataset.train, context_tokens=config.context_tokens, batch_size=config.batch_size, seed=config.seed)
    claim_folder(run, config, dataset)
    return _train(config, run, dataset, None)


def resume(run: Path) -> Evaluation:
    """Go on with a stopped run from its newest checkpoint, with the very next batch. Returns and raises as `start`."""
    record = read_run(run)
    _refuse_missing(record.train)
    checkpoint = newest_checkpoint(run)
    dataset = open_dataset(record.dataset)
    if dataset.tokenizer.sha256 != record.tokenizer_sha256:
        raise InputError(
            f"{record.dataset}: expected shards of tokenizer {record.tokenizer_sha256[:12]} as {run} was trained on, "
            f"got {dataset.tokenizer.sha256[:12]}; build the dataset as it was, or start a new run"
        )
    return _train(record.train, run, dataset, checkpoint)


def _refuse_missing(config: TrainConfig) -> None:
    """Raise InputError for what the options ask of this machine and it does not have."""
    refuse_missing_attention(config, choose_device(config.device))
    refuse_missing_optimizer(config)
    refuse_missing_trackers(config)


def _train(config: TrainConfig, run: Path, dataset: Dataset, checkpoint: Path | None) -> Evaluation:
    device = choose_device(config.device)
    choose_matmul(device)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    model = GPT(config.gpt(dataset.tokenizer.vocab_size), attention=config.attention).to(device)
    optimizer = Optimizer(model, config)
    first = _begin(config, run, model, optimizer) if checkpoint is None else load_checkpoint(checkpoint, model, optimizer)
    loader = Loader(dataset.train, context_tokens=config.context_tokens, batch_size=config.batch_size, seed=config.seed)
    trainer = Trainer(model, optimizer, config, separator=dataset.tokenizer.end_of_text if config.document_mask else None)
    metrics = Metrics(
        run, start=first, steps=config.steps, tokens_per_step=config.batch_size * config.context_tokens,
        flops_per_token=flops_per_token(model.config, config.context_tokens), device=device,
        skips_overflow=optimizer.scaler.is_enabled(), trackers=open_trackers(config, run, first),
    )  # fmt: skip
    if trainer.is_compiled:
        console.print("compiling the model: the first step takes longer, less so once it is in the cache")
    with metrics, _Signals() as signals, quiet_collector():

        def evaluate_after(done: int) -> Evaluation | None:
            """Evaluate and sample, or, asked to stop, write a checkpoint and stop."""
            with metrics.paused():
                result = _evaluate(config, trainer, dataset, signals, None if done == config.steps else config.eval_tokens)
                if signals.received:
                    if not (run / "checkpoints" / f"step-{done}").exists():
                        save_checkpoint(run, done, model, optimizer, keep=config.keep_checkpoints)
                    raise InterruptedRun(run)
                metrics.evaluation(done, result)
                _write_sample(config, run, trainer.working, dataset, done)
                plot_loss(run)
                gc.collect()
            return result

        for step in profiled(range(first, config.steps), config, run, metrics, device):
            # Before the step, not after the one before: a run stopped in between makes up for it when it is resumed.
            if signals.received or (step > 0 and step % config.eval_interval == 0 and step not in metrics.evaluated):
                evaluate_after(step)
            lr = learning_rate(config, step)
            with metrics.waiting():
                batch = loader.batch(step)
            loss = trainer.backward(*batch)
            metrics.step(step, loss, lr, trainer.update(lr))

            done = step + 1
            if done == config.steps or done % config.checkpoint_interval == 0:
                with metrics.paused():
                    save_checkpoint(run, done, model, optimizer, keep=config.keep_checkpoints)
        return evaluate_after(config.steps)


def _begin(config: TrainConfig, run: Path, model: GPT, optimizer: Optimizer) -> int:
    """A checkpoint before the first step: from here on the run can be resumed, and a disk too small for it shows now."""
    try:
        save_checkpoint(run, 0, model, optimizer, keep=config.keep_checkpoints)
    except BaseException:
        shutil.rmtree(run)
        raise
    return 0


def _evaluate(
    config: TrainConfig, trainer: Trainer, dataset: Dataset, signals: "_Signals", max_tokens: int | None
) -> Evaluation | None:
    """None if a signal came first."""
    batches = evaluation_batches(
        dataset.val, context_tokens=config.context_tokens, batch_size=config.micro_batch, max_tokens=max_tokens
    )
    until_signal = itertools.takewhile(lambda _: not signals.received, batches)
    bytes_per_token = dataset.info.val.bytes / dataset.info.val.tokens
    return evaluate(trainer.working, until_signal, bytes_per_token=bytes_per_token, separator=trainer.separator)


def _write_sample(config: TrainConfig, run: Path, model: GPT, dataset: Dataset, step: int) -> None:
    options = {"max_new_tokens": config.sample_tokens, "temperature": 0.8, "top_p": 0.95, "seed": config.seed}
    text = sample_text(model, dataset.tokenizer, config.prompt, **options)
    with open(run / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"--- step {step}\n{text}\n")


def sample_text(model: GPT, tokenizer, prompt: str, *, max_new_tokens: int, seed: int | None, **options) -> str:
    """The prompt (an empty one: the start of a document) with the model's continuation, up to its end of text."""
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
    device = model.wte.weight.device
    tokens = torch.tensor([ids[-model.config.context_tokens :]], device=device)
    out = model.generate(tokens, max_new_tokens, seed=seed, stop_token=tokenizer.end_of_text, **options)
    new = out[0, tokens.shape[1] :].tolist()
    return prompt + tokenizer.decode([token for token in new if token != tokenizer.end_of_text])


class _Signals:
    """Turns the first SIGINT or SIGTERM into a note, read between steps and between batches of an evaluation.

    A second SIGINT interrupts at once.
    """

    received = False

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        console.print("stopping; a checkpoint will be written")

"""The training loop, from a configuration to a trained model, top to bottom.

A run is a folder: config.json (all that is needed to repeat it), tokenizer.json, metrics.jsonl, samples.txt, loss.png,
checkpoints/step-N. On one CPU a resumed run has bitwise the weights of one that was never stopped.
"""

import gc
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import InputError, InterruptedRun
from ..model import GPT
from ..model.cost import flops_per_token
from .config import TrainConfig
from .data.dataset import Dataset, open_dataset
from .data.loader import Loader, evaluation_batches
from .data.prefetch import Prefetch
from .data.prepare import cache_dir, prepare
from .device import choose_matmul, keep_freed_memory
from .distributed.engines import choose_fitting, shard
from .distributed.world import SINGLE_PROCESS, Signals, World
from .evaluate import Evaluation
from .optim import Optimizer
from .run.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from .run.folder import check_folder_unused, claim_folder, read_run
from .run.metrics import Metrics, console
from .run.plots import plot_loss
from .run.profile import check_profile_steps, profiled
from .run.trackers import open_trackers
from .schedule import learning_rate
from .trainer import Trainer, is_compiled, quiet_collector


def start(config: TrainConfig, run: Path, world: World = SINGLE_PROCESS) -> Evaluation:
    """Train a new model into the folder `run`, which the first rank alone writes.

    Returns: the evaluation of the finished model on all held-out text.
    Raises: InputError for a folder in use, bad data, a world that does not fit or a training that diverges; InterruptedRun
        after SIGINT or SIGTERM.
    """
    world.on_rank0(lambda: check_folder_unused(run))
    device = choose_fitting(config, world)
    check_profile_steps(config)

    def prepared() -> Dataset:
        folder = cache_dir() / "datasets"
        path = prepare(
            config.data, config.tokenizer, folder, held_out=config.held_out, progress=world.is_rank0
        )
        dataset = open_dataset(path)
        # What only an evaluation would find out, found out now.
        dataset.tokenizer.encode(config.report.prompt)
        next(
            evaluation_batches(
                dataset.val, context_tokens=config.model.context_tokens, batch_size=1, max_tokens=1
            )
        )
        Loader(
            dataset.train,
            context_tokens=config.model.context_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        return dataset

    # One rank of a node builds it, the others find it.
    dataset = world.run_on_all_ranks(lambda: prepared() if world.local_rank == 0 else None)
    dataset = world.run_on_all_ranks(lambda: dataset or prepared())
    world.on_rank0(lambda: claim_folder(run, config, dataset))
    return _train(config, run, dataset, None, device, world)


def resume(run: Path, world: World = SINGLE_PROCESS) -> Evaluation:
    """Go on with a stopped run from its newest checkpoint, with the very next batch. Returns and raises as `start`."""
    record = world.on_rank0(lambda: read_run(run))
    checkpoint = world.on_rank0(lambda: newest_checkpoint(run))
    device = choose_fitting(record.train, world)
    dataset = world.run_on_all_ranks(lambda: open_dataset(record.dataset))
    if dataset.tokenizer.sha256 != record.tokenizer_sha256:
        raise InputError(
            f"{record.dataset}: expected shards of tokenizer {record.tokenizer_sha256[:12]} as {run} was trained on, "
            f"got {dataset.tokenizer.sha256[:12]}; build the dataset as it was, or start a new run"
        )
    return _train(record.train, run, dataset, checkpoint, device, world)


def _train(
    config: TrainConfig,
    run: Path,
    dataset: Dataset,
    checkpoint: Path | None,
    device: torch.device,
    world: World,
) -> Evaluation:
    world.check_same_on_all_ranks(
        "data", (dataset.tokenizer.sha256[:12], len(dataset.train), len(dataset.val))
    )
    choose_matmul(device)
    keep_freed_memory()
    model = _model(config, dataset.tokenizer.vocab_size, device, world)
    optimizer = Optimizer(model, config, world)

    def save(done: int) -> None:
        save_checkpoint(
            run, done, model, optimizer, keep=config.report.keep_checkpoints, world=world
        )

    first = (
        _begin(run, save, world)
        if checkpoint is None
        else load_checkpoint(checkpoint, model, optimizer, world=world)
    )
    loader = Loader(
        dataset.train, context_tokens=config.model.context_tokens, batch_size=config.batch_size, seed=config.seed,
        rank=world.data_rank, world_size=world.data_ranks, pinned=device.type == "cuda",
    )  # fmt: skip
    separator = dataset.tokenizer.end_of_text if config.document_mask else None
    trainer = Trainer(model, optimizer, config, separator=separator, world=world)
    metrics = Metrics(
        run, start=first, steps=config.steps, tokens_per_step=config.batch_size * config.model.context_tokens,
        flops_per_token=flops_per_token(model.config, config.model.context_tokens), device=device,
        skips_overflow=optimizer.scaler.is_enabled(), world=world,
        trackers=open_trackers(config, run, first) if world.is_rank0 else (),
    )  # fmt: skip
    if trainer.is_compiled:
        console.print(
            "compiling the model: the first step takes longer, less so once it is in the cache"
        )
    with (
        metrics,
        Signals(world) as signals,
        quiet_collector(),
        Prefetch(loader.batch, first) as batches,
    ):

        def evaluate_after(done: int) -> Evaluation | None:
            """Evaluate and sample, or, asked to stop, write a checkpoint and stop."""
            with metrics.paused():
                result = _evaluate(
                    config,
                    trainer,
                    dataset,
                    signals,
                    None if done == config.steps else config.report.eval_tokens,
                )
                if signals.received:
                    if not world.on_rank0(lambda: (run / "checkpoints" / f"step-{done}").exists()):
                        save(done)
                    raise InterruptedRun(run)
                metrics.evaluation(done, result)
                sampled = trainer.on_first_rank()
                world.on_rank0(lambda: _write_sample(config, run, sampled, dataset, done))
                gc.collect()
            return result

        for step in profiled(range(first, config.steps), config, run, metrics, device, world):
            # Before the step, not after the one before: a run stopped in between makes up for it when it is resumed.
            if signals.received or (
                step > 0
                and step % config.report.eval_interval == 0
                and step not in metrics.evaluated
            ):
                evaluate_after(step)
            lr = learning_rate(config, step)
            with metrics.waiting():
                batch = next(batches)
            loss = trainer.backward(batch, loader.num_targets(step) if world.size > 1 else None)
            metrics.step(step, loss, lr, trainer.update(lr))

            done = step + 1
            if done == config.steps or done % config.report.checkpoint_interval == 0:
                with metrics.paused():
                    save(done)
        return evaluate_after(config.steps)


def _model(config: TrainConfig, vocab_size: int, device: torch.device, world: World) -> GPT:
    """A new model, of which each rank has its share."""
    torch.manual_seed(config.seed)
    model = GPT(
        config.gpt(vocab_size),
        attention=config.execution.attention,
        recompute=config.execution.recompute,
    ).to(device)
    shard(model, config, world, compiled=is_compiled(config, device))
    return model


def _begin(run: Path, save: Callable[[int], None], world: World) -> int:
    """A checkpoint before the first step: from here on the run can be resumed, and a disk too small for it shows now."""
    try:
        save(0)
    except BaseException:
        if world.is_rank0:
            shutil.rmtree(run)
        raise
    return 0


def _evaluate(
    config: TrainConfig,
    trainer: Trainer,
    dataset: Dataset,
    signals: Signals,
    max_tokens: int | None,
) -> Evaluation | None:
    """None if a signal came first."""
    world = trainer.world
    batches = evaluation_batches(
        dataset.val, context_tokens=config.model.context_tokens, batch_size=world.micro_batch(config), max_tokens=max_tokens,
        rank=world.data_rank, world_size=world.data_ranks,
    )  # fmt: skip
    until_signal = itertools.takewhile(lambda _: not signals.received, batches)
    bytes_per_token = dataset.info.val.bytes / dataset.info.val.tokens
    return trainer.evaluate(until_signal, bytes_per_token=bytes_per_token)


def _write_sample(config: TrainConfig, run: Path, model: GPT, dataset: Dataset, step: int) -> None:
    options = {
        "max_new_tokens": config.report.sample_tokens,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": config.seed,
    }
    text = sample_text(model, dataset.tokenizer, config.report.prompt, **options)
    with open(run / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"--- step {step}\n{text}\n")
    plot_loss(run)


def sample_text(
    model: GPT, tokenizer, prompt: str, *, max_new_tokens: int, seed: int | None, **options
) -> str:
    """The prompt (an empty one: the start of a document) with the model's continuation, up to its end of text."""
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
    device = model.wte.weight.device
    tokens = torch.tensor([ids[-model.config.context_tokens :]], device=device)
    out = model.generate(
        tokens, max_new_tokens, seed=seed, stop_token=tokenizer.end_of_text, **options
    )
    new = out[0, tokens.shape[1] :].tolist()
    return prompt + tokenizer.decode([token for token in new if token != tokenizer.end_of_text])

"""The training recipe: check the model, read text, extract states, train heads.

python model/train_medusa.py --base_model_path X.gguf --dataset_name chats.jsonl
torchrun --nproc_per_node 2 model/train_medusa.py …
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # numpy's threads beside llama.cpp's make both slow.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # of several processes, one shows its progress
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import torch  # noqa: E402

from config import Settings  # noqa: E402
from model.base.chat import template_of  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.base.known_models import model_file  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.base.lm_head import check_lm_head  # noqa: E402
from model.base.load_check import check_loads  # noqa: E402
from model.errors import ModelFileError, UsageError  # noqa: E402
from model.heads.draft_vocabulary import draft_vocabulary  # noqa: E402
from model.heads.files import base_facts, load_heads, new_heads  # noqa: E402
from model.heads.known_heads import HEADS_FOLDER  # noqa: E402
from model.heads.medusa import HeadsConfig, MedusaHeads  # noqa: E402
from model.planning.training_curve import training_curve  # noqa: E402
from model.storage.disk_room import require_writable  # noqa: E402
from model.storage.folder_lock import WriterLock  # noqa: E402
from model.storage.whole_folder import former_folder  # noqa: E402
from model.training.command import run_command, script_command  # noqa: E402
from model.training.data.documents import read_documents  # noqa: E402
from model.training.data.samples import (  # noqa: E402
    Sample,
    count_tokens,
    digest,
    make_samples,
    split_samples,
    token_counts,
)
from model.training.options import TrainOptions  # noqa: E402
from model.training.output_folder import choose_output_dir, require_no_run  # noqa: E402
from model.training.ranks import Ranks, joined, ranks_asked_for  # noqa: E402
from model.training.run_choices import (  # noqa: E402
    choose_device,
    choose_length,
    data_source,
    with_absolute_paths,
)
from model.training.schedule import choose_schedule  # noqa: E402
from model.training.states.batches import Batches  # noqa: E402
from model.training.states.cached_states import cached_states  # noqa: E402
from model.training.states.extraction import States, open_base  # noqa: E402
from model.training.states.manifest import CacheKey  # noqa: E402
from model.training.states.streamed_states import StreamedStates  # noqa: E402
from model.training.timed_run import FOLDER, TimedRun  # noqa: E402
from model.training.tracking import require_tracker  # noqa: E402
from model.training.train_command import train_options  # noqa: E402
from model.training.trainer import Trainer, TrainResult  # noqa: E402
from model.trees.costs import CostCurve  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run is given, and what was decided from it before anything was read."""

    options: TrainOptions
    settings: Settings
    ranks: Ranks
    device: torch.device
    threads: int  # of this process
    file: GGUFFile
    output_dir: Path
    max_length: int  # tokens per sequence

    @property
    def say(self) -> Callable[[str], None]:
        """What prints a line: of several processes, the first one's."""
        return click.echo if self.ranks.first else silently


def train(
    options: TrainOptions,
    *,
    overwrite: bool = False,
    until: float | None = None,
    start: Path | None = None,
) -> TrainResult:
    """Train heads as the options say; progress is shown on the terminal. Raises MedusaError.

    overwrite: begin anew in a folder that holds a run already. until: train up to this time
    (time.monotonic's) instead of `--epochs`. start: heads to go on from, where they are there and
    as the options say.
    """
    settings = Settings.load()
    ranks = ranks_asked_for()
    logging.basicConfig(level=settings.log_level, format="%(message)s")
    device = choose_device(options.device, ranks.local)
    require_tracker(options.report_to)
    if ranks.count > 1 and options.cache == "off":
        raise UsageError(
            "--cache off: several processes share their states through the cache; use --cache on"
        )
    with (
        joined(ranks, device),
        contextlib.ExitStack() as locked,
        contextlib.ExitStack() as opened,
    ):
        # The model: can it be loaded, rolled back, and read with the LM head that the file holds?
        file = check_loads(Path(options.base_model_path))
        run = Setup(
            options=options,
            settings=settings,
            ranks=ranks,
            device=device,
            threads=max(1, settings.n_threads // ranks.local_count),
            file=file,
            output_dir=writable_output_dir(options, file, overwrite=overwrite),
            max_length=choose_length(options.max_length, file.context_length),
        )
        model = opened.enter_context(contextlib.closing(load_model(run)))
        check_lm_head(model, file, run.threads)
        curve = step_costs(run, model)
        shape = f"D={file.n_embd}, V={file.n_vocab}, {file.n_layer} layers"
        run.say(f"model   {file.name} ({file.file_type}): {shape}")

        # The text: documents, tokens, windows.
        samples = read_samples(run, model)
        amount = f"{count_tokens(samples):,} tokens, {len(samples):,} sequences"
        run.say(f"text    {data_source(options)}: {amount} up to {run.max_length}")
        learn, check = split_samples(samples, options.val_fraction, options.seed)

        # The states: what the model makes of the text, kept on disk or made anew in each epoch.
        if ranks.first:
            locked.enter_context(WriterLock(run.output_dir))
        began = time.monotonic()
        states = open_states(run, model, samples, opened)
        states_s = time.monotonic() - began

        # The heads: as they are at first, or where an earlier run left them.
        torch.set_num_threads(run.threads)
        torch.manual_seed(options.seed)
        counts = token_counts((samples[i] for i in learn), file.n_vocab)
        taught = taught_heads(run, start)
        heads = (taught or untaught_heads(run, counts)).to(device)
        n_learnt = sum(p.numel() for p in heads.parameters())
        kind = f"{options.k_heads} ({options.head_type})"
        drafts_from = f"draft vocabulary of {heads.config.n_rows:,} tokens"
        run.say(f"heads   {kind}, {n_learnt:,} parameters, {drafts_from}, on {device.type}")
        trainer = new_trainer(
            run, heads, states, learn, check, counts, curve, until, taught=taught is not None
        )
        if options.resume_from:
            trainer.resume(Path(options.resume_from))

        # The training itself.
        return replace(trainer.fit(), states_s=states_s)


def silently(message: str) -> None:
    """Say nothing: another process of the run does."""


def writable_output_dir(options: TrainOptions, file: GGUFFile, *, overwrite: bool) -> Path:
    """Return where the heads go. Raises UsageError for another run's folder, or OutputError."""
    output_dir = choose_output_dir(options, file, HEADS_FOLDER)
    require_writable(output_dir)
    if not overwrite:
        require_no_run(output_dir, options.resume_from)
    return output_dir


def load_model(run: Setup) -> LlamaModel:
    """Return the model. Raises ModelFileError where nothing could be drafted for it.

    Each of several processes uses a GPU of its own, as far as there are any.
    """
    settings = run.settings
    gpu = None
    if run.ranks.count > 1 and settings.n_gpu_layers and torch.cuda.device_count():
        gpu = run.ranks.local % torch.cuda.device_count()
    model = LlamaModel(
        run.file.path, n_gpu_layers=settings.n_gpu_layers, use_mmap=settings.use_mmap,
        use_mlock=settings.use_mlock, gpu=gpu,
    )  # fmt: skip
    if model.can_roll_back:
        return model
    model.close()
    raise ModelFileError(
        f"{run.file.path}: {run.file.architecture} models cannot roll back, "
        "so nothing can be drafted"
    )


def step_costs(run: Setup, model: LlamaModel) -> CostCurve | None:
    """Return what steps cost here, by which the draft tree's size is chosen; the first process's.

    It holds for all, and two that measure at a time disturb each other.
    """
    if not run.ranks.first:
        return None
    settings = run.settings
    return training_curve(
        model, run.file.file_fingerprint(), settings.medusa_max_tokens_per_step, run.threads,
        flash_attn=settings.flash_attn, kv_type=settings.kv_type,
    )  # fmt: skip


def read_samples(run: Setup, model: LlamaModel) -> list[Sample]:
    """Return the data set as windows of the model's tokens."""
    documents = read_documents(run.options.dataset_name, run.options.dataset_split)
    return make_samples(
        documents, model, template_of(run.file.metadata), run.max_length, run.options.max_tokens,
        vocabulary=run.file.heads_fingerprint(), base=run.file.name,
    )  # fmt: skip


def open_states(
    run: Setup, model: LlamaModel, samples: list[Sample], opened: contextlib.ExitStack
) -> States:
    """Return the states of all samples, from the cache or made whenever they are read.

    opened: what holds the model. It is closed where the cache holds all: the memory is the heads'
    from there on.
    """
    # What makes them: a context of the base model.
    settings = run.settings

    def base() -> LlamaBase:
        return open_base(
            model, run.max_length, run.threads,
            flash_attn=settings.flash_attn, kv_type=settings.kv_type,
        )  # fmt: skip

    if run.options.cache == "off":
        streamed = StreamedStates(opened.enter_context(base()), samples)
        return opened.enter_context(contextlib.closing(streamed))

    # The cache of this model, text and number type.
    key = CacheKey(
        base_fingerprint=run.file.file_fingerprint(),
        tokenizer=run.file.heads_fingerprint(),
        data_sha256=digest(samples),
        max_length=run.max_length,
        dtype=run.options.cache_dtype,
        kv_type=settings.kv_type,
    )
    folder = ROOT / ".cache" / "states" / f"{run.file.path.stem}-{key.folder_name()}"
    if run.options.cache_dir:
        folder = Path(run.options.cache_dir)
    states = cached_states(
        base, run.file.n_embd, samples, folder, key,
        data_source=data_source(run.options), ranks=run.ranks,
    )  # fmt: skip
    opened.close()
    return states


def taught_heads(run: Setup, folder: Path | None) -> MedusaHeads | None:
    """Return the heads of an earlier run, to be taught more; None where they are others, or none.

    They keep their draft vocabulary.
    """
    if folder is None or not (folder.exists() or former_folder(folder).exists()):
        return None
    heads, _ = load_heads(folder, run.file)
    draft_ids = heads.draft_ids.numpy() if heads.config.draft_vocab else None
    wanted = run.options.draft_vocab
    as_wanted = wanted in (None, heads.config.draft_vocab, heads.config.n_rows)
    if heads.config != heads_config(run, draft_ids) or not as_wanted:
        run.say(f"heads   those in {folder} are of another kind: others are taught from the start")
        return None
    run.say(f"heads   those in {folder} are taught more")
    return heads.requires_grad_()


def untaught_heads(run: Setup, counts: npt.NDArray[np.int64]) -> MedusaHeads:
    """Return heads that have learnt nothing yet. counts: (V,) see `token_counts`."""
    draft_ids = draft_vocabulary(counts, run.options.draft_vocab)
    ids = None if draft_ids is None else torch.from_numpy(draft_ids)
    return new_heads(heads_config(run, draft_ids), run.file, draft_ids=ids)


def heads_config(run: Setup, draft_ids: npt.NDArray[np.int32] | None) -> HeadsConfig:
    """Return what decides the shapes of the heads."""
    options = run.options
    return HeadsConfig(
        k_heads=options.k_heads, dim=run.file.n_embd, vocab=run.file.n_vocab,
        head_layers=options.head_layers, hidden_dim=options.hidden_dim, lm_head=options.lm_head,
        head_type=options.head_type, draft_vocab=0 if draft_ids is None else len(draft_ids),
    )  # fmt: skip


def new_trainer(
    run: Setup,
    heads: MedusaHeads,
    states: States,
    learn: list[int],
    check: list[int],
    counts: npt.NDArray[np.int64],
    curve: CostCurve | None,
    until: float | None,
    *,
    taught: bool,
) -> Trainer:
    """Return what trains the heads.

    learn, check: indices of the samples to train and validate on. counts: (V,) see `token_counts`.
    taught: whether the heads have learnt before.
    """
    # The batches.
    samples = states.samples
    n_positions = sum(int(samples[i].mask.sum()) for i in learn)
    schedule = choose_schedule(run.options, n_positions, run.max_length)
    options = replace(run.options, epochs=schedule.epochs, learning_rate=schedule.learning_rate)
    size = schedule.positions
    batches = Batches(states, learn, options.k_heads, size)
    steps = -(-len(batches) // options.gradient_accumulation_steps)
    run.say(
        f"steps   {steps * options.epochs:,} of {size:,} positions at most, "
        f"{options.epochs} epochs, learning rate {options.learning_rate:g}"
    )
    return Trainer(
        heads,
        batches,
        Batches(states, check, options.k_heads, size),
        options,
        run.output_dir,
        facts={
            **base_facts(run.file),
            "token_counts": counts,
            "training": {
                "data_source": data_source(options),
                "tokens": count_tokens(samples),
                "max_length": run.max_length,
            },
        },
        identity={
            "text (SHA-256)": digest(samples),
            "base model (SHA-256)": run.file.file_fingerprint(),
            "KV_TYPE": run.settings.kv_type,
        },
        teacher=base_lm_head(heads, run.file) if options.loss == "kd" else None,
        curve=curve,
        ranks=run.ranks,
        until=until,
        taught=taught,
    )


def train_for_hours(options: TrainOptions) -> TrainResult:
    """Let the model write answers and train on them, for `--hours` in all. Raises MedusaError."""
    if ranks_asked_for().count > 1:
        raise UsageError("--hours: for one process; under torchrun, distil first and train then")
    if options.resume_from:
        raise UsageError("--hours: goes on by itself in its --output_dir; leave --resume_from out")
    file = check_loads(Path(options.base_model_path))
    folder = choose_output_dir(options, file, HEADS_FOLDER)
    require_writable(folder)
    with WriterLock(folder / FOLDER):
        return TimedRun(
            options,
            folder,
            train=lambda options, until, start: train(
                options, overwrite=True, until=until, start=start
            ),
            command=[sys.executable, str(ROOT / "model" / "distill.py")],
        ).run()


def base_lm_head(heads: MedusaHeads, file: GGUFFile) -> torch.Tensor:
    """Return the base model's LM head (R, D), where the heads are."""
    if heads.config.lm_head == "tied":
        return heads.lm_head
    rows = heads.draft_ids.cpu().numpy()
    return torch.from_numpy(file.output_weight(rows)).to(heads.weight.device)


def resume_command(output_dir: Path) -> str:
    """Return what to type to go on with a run."""
    return f"{script_command(Path(__file__))} --resume_from {shlex.quote(str(output_dir))}"


def report(result: TrainResult, base_model: str, *, timed: bool) -> None:
    """Say where things lie, and what to type next. timed: the run had `--hours`."""
    if result.interrupted:
        click.echo(f"stopped after {result.steps} steps; saved in {result.latest}; to go on:")
        again = f"{script_command(Path(__file__))} {shlex.join(sys.argv[1:])}"
        click.echo(f"  {again if timed else resume_command(result.output_dir)}")
        return
    folder = result.output_dir
    click.echo(f"done    {result.steps} steps in {result.seconds:.0f} s; heads in {result.best}")
    click.echo(f"curves  {folder / 'training.png'}; all figures: {folder / 'metrics.jsonl'}")
    click.echo("now     measure their speedup, with")
    model = f"MODEL_PATH={shlex.quote(base_model)}"
    heads = f"MEDUSA_WEIGHTS_PATH={shlex.quote(str(result.best))}"
    click.echo(f"  {model} {heads} {script_command(ROOT / 'main.py')} bench")


@click.command()
@train_options
def main(**values: Any) -> None:
    """Train draft heads for a GGUF file."""
    options = TrainOptions(**values)
    base = options.base_model_path
    path = model_file(base) if base else Settings.load().model_path
    options = with_absolute_paths(replace(options, base_model_path=str(path)))
    result = train_for_hours(options) if options.hours else train(options)
    if ranks_asked_for().first:
        report(result, options.base_model_path, timed=options.hours > 0)
    if result.interrupted:
        sys.exit(130)


def run() -> None:
    """Run the command."""
    run_command(main, "stopped; the same command goes on with the states that are finished")


if __name__ == "__main__":
    run()

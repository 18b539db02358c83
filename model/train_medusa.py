"""Train Medusa heads for a GGUF file: check the model, read text, extract states, train, say what to type next.

python model/train_medusa.py --base_model_path X.gguf --dataset_name chats.jsonl
torchrun --nproc_per_node 2 model/train_medusa.py …
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads beside llama.cpp's: both are slow
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # of several processes, one shows its progress
    sys.path[0] = str(ROOT)

import click  # noqa: E402
import torch  # noqa: E402

from config import HEADS_FOLDER, Settings  # noqa: E402
from model.base.chat import template_of  # noqa: E402
from model.base.gguf_file import GGUFFile  # noqa: E402
from model.base.llama import LlamaBase  # noqa: E402
from model.base.llama_model import LlamaModel  # noqa: E402
from model.base.lm_head import check_lm_head  # noqa: E402
from model.base.load_check import check_loads  # noqa: E402
from model.errors import ModelFileError, UsageError  # noqa: E402
from model.heads.files import base_facts, new_heads  # noqa: E402
from model.heads.medusa import HeadsConfig, MedusaHeads  # noqa: E402
from model.measuring.training_curve import training_curve  # noqa: E402
from model.training.batches import Batches  # noqa: E402
from model.training.command import run_command, script_command  # noqa: E402
from model.training.documents import read_documents  # noqa: E402
from model.training.extraction import States, StreamedStates, open_base  # noqa: E402
from model.training.options import TrainOptions  # noqa: E402
from model.training.output_folder import choose_output_dir, require_no_run  # noqa: E402
from model.training.ranks import Ranks, joined, ranks_asked_for  # noqa: E402
from model.training.states import CacheKey, cached_states  # noqa: E402
from model.training.storage import WriterLock, require_writable  # noqa: E402
from model.training.text import Sample, digest, make_samples, split_samples, token_counts  # noqa: E402
from model.training.tracking import require_tracker  # noqa: E402
from model.training.train_command import train_options  # noqa: E402
from model.training.trainer import Trainer, TrainResult  # noqa: E402

LONGEST = 1024  # tokens per sequence, where nothing is said


def train(options: TrainOptions, *, overwrite: bool = False) -> TrainResult:
    """Train heads as the options say; progress is shown on the terminal. Raises MedusaError.

    overwrite: begin anew in a folder that holds a run already.
    """
    settings, ranks = Settings.load(), ranks_asked_for()
    logging.basicConfig(level=settings.log_level, format="%(message)s")
    device = choose_device(options.device, ranks.local)
    threads = max(1, settings.n_threads // ranks.local_count)
    tell = click.echo if ranks.first else silently
    require_tracker(options.report_to)
    if ranks.count > 1 and options.cache == "off":
        raise UsageError("--cache off: several processes share their states through the cache; use --cache on")
    with joined(ranks, device), contextlib.ExitStack() as locked, contextlib.ExitStack() as opened:
        # The model: can it be loaded, rolled back, and read with the LM head that the file holds?
        file = check_loads(Path(options.base_model_path))
        output_dir = choose_output_dir(options, file, HEADS_FOLDER)
        require_writable(output_dir)
        if not overwrite:
            require_no_run(output_dir, options.resume_from)
        max_length = choose_length(options.max_length, file.context_length)
        model = opened.enter_context(contextlib.closing(load_model(file, settings, ranks)))
        check_lm_head(model, file, threads)
        curve = None
        if ranks.first:  # what it says of the tree holds for all, and two that measure at a time disturb each other
            curve = training_curve(
                model, file.file_fingerprint(), settings.medusa_max_tokens_per_step, threads,
                flash_attn=settings.flash_attn, kv_type=settings.kv_type,
            )  # fmt: skip
        tell(f"model   {file.name} ({file.file_type}): D={file.n_embd}, V={file.n_vocab}, {file.n_layer} layers")

        # The text: documents, tokens, windows; some of them are kept for validation.
        documents = read_documents(options.dataset_name, options.dataset_split)
        samples = make_samples(
            documents, model, template_of(file.metadata), max_length, options.max_tokens,
            vocabulary=file.heads_fingerprint(), base=file.name,
        )  # fmt: skip
        learn, check = split_samples(samples, options.val_fraction, options.seed)
        n_tokens = sum(len(sample.tokens) for sample in samples)
        tell(f"text    {data_source(options)}: {n_tokens:,} tokens, {len(samples):,} sequences up to {max_length}")

        # The states: what the model makes of the text, kept on disk or made anew in each epoch.
        if ranks.first:
            locked.enter_context(WriterLock(output_dir))
        states: States

        def base() -> LlamaBase:
            return open_base(model, max_length, threads, flash_attn=settings.flash_attn, kv_type=settings.kv_type)

        if options.cache == "off":
            streamed = StreamedStates(opened.enter_context(base()), samples)
            states = opened.enter_context(contextlib.closing(streamed))
        else:
            states = kept_states(options, file, base, samples, max_length, settings.kv_type, ranks)
            opened.close()  # the memory is the heads' from here on

        # The heads: as they are at first, or where an earlier run left them.
        torch.set_num_threads(threads)
        torch.manual_seed(options.seed)
        heads = new_heads(shape_of(options, file), file).to(device)
        n_learnt = sum(p.numel() for p in heads.parameters())
        tell(f"heads   {options.k_heads} ({options.head_type}), {n_learnt:,} parameters, on {device.type}")
        size = options.batch_size * max_length
        batches, validation = (Batches(states, indices, options.k_heads, size) for indices in (learn, check))
        facts = {
            **base_facts(file),
            "token_counts": token_counts((samples[i] for i in learn), file.n_vocab),
            "training": {"data_source": data_source(options), "tokens": n_tokens, "max_length": max_length},
        }
        identity = {
            "text (SHA-256)": digest(samples),
            "base model (SHA-256)": file.file_fingerprint(),
            "KV_TYPE": settings.kv_type,
        }
        teacher = base_lm_head(heads, file) if options.loss == "kd" else None
        trainer = Trainer(
            heads, batches, validation, options, output_dir, facts=facts, identity=identity, teacher=teacher,
            curve=curve, ranks=ranks,
        )  # fmt: skip
        if options.resume_from:
            trainer.resume(Path(options.resume_from))

        # The training itself.
        return trainer.fit()


def silently(message: str) -> None:
    """Take what another process of the run says already."""


def load_model(file: GGUFFile, settings: Settings, ranks: Ranks) -> LlamaModel:
    """Return the model. Raises ModelFileError where nothing could be drafted for it.

    Of several processes each takes a GPU of its own, as far as there are any.
    """
    gpus = torch.cuda.device_count() if ranks.count > 1 and settings.n_gpu_layers else 0
    model = LlamaModel(
        file.path, n_gpu_layers=settings.n_gpu_layers, use_mmap=settings.use_mmap, use_mlock=settings.use_mlock,
        gpu=ranks.local % gpus if gpus else None,
    )  # fmt: skip
    if model.can_roll_back:
        return model
    model.close()
    raise ModelFileError(f"{file.path}: {file.architecture} models cannot roll back, so nothing can be drafted")


def shape_of(options: TrainOptions, file: GGUFFile) -> HeadsConfig:
    """Return what decides the shapes of a model's heads."""
    o = options
    return HeadsConfig(o.k_heads, file.n_embd, file.n_vocab, o.head_layers, o.hidden_dim, o.lm_head, o.head_type)


def base_lm_head(heads: MedusaHeads, file: GGUFFile) -> torch.Tensor:
    """Return the base model's LM head, where the heads are."""
    tied = heads.config.lm_head == "tied"
    return heads.lm_head if tied else torch.from_numpy(file.output_weight()).to(heads.weight.device)


def kept_states(
    options: TrainOptions, file: GGUFFile, base: Callable[[], LlamaBase], samples: list[Sample], max_length: int,
    kv_type: str, ranks: Ranks,
) -> States:  # fmt: skip
    """Return the states of all samples, extracted into the cache where they aren't there yet."""
    model, tokenizer = file.file_fingerprint(), file.heads_fingerprint()
    key = CacheKey(model, tokenizer, digest(samples), max_length, options.cache_dtype, kv_type)
    default = ROOT / ".cache" / "states" / f"{file.path.stem}-{key.folder_name()}"
    folder = Path(options.cache_dir) if options.cache_dir else default
    return cached_states(base, file.n_embd, samples, folder, key, data_source=data_source(options), ranks=ranks)


def choose_device(name: str, number: int = 0) -> torch.device:
    """Return the device to train on; number: which GPU. Raises UsageError for one that torch doesn't see."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        seen = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise UsageError(
            f"--device {name}: process {number} of this machine needs a GPU, torch sees {seen}; use --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_length(asked: int, context_length: int) -> int:
    """Return the tokens per sequence. Raises UsageError where the model wasn't made for so many."""
    if asked > context_length:
        raise UsageError(f"--max_length {asked}: the model's context holds {context_length} tokens")
    if 0 < asked < 8:
        raise UsageError(f"--max_length {asked}: too short to learn from; use 8 or more")
    return asked or min(LONGEST, context_length)


def data_source(options: TrainOptions) -> str:
    """Name the text in one line."""
    if not options.dataset_name:
        return f"standard library of Python {sysconfig.get_python_version()}"
    local = Path(options.dataset_name).expanduser()
    return local.name if local.exists() else f"{options.dataset_name} [{options.dataset_split}]"


def absolute(options: TrainOptions) -> TrainOptions:
    """Return the options with whole paths, so that a run can be resumed from any directory."""
    places = ["base_model_path", "output_dir", "cache_dir", "resume_from"]
    if Path(options.dataset_name).expanduser().exists():
        places.append("dataset_name")
    values = {name: getattr(options, name) for name in places}
    whole: dict[str, Any] = {name: os.path.abspath(Path(v).expanduser()) for name, v in values.items() if v}
    return replace(options, **whole)


def resume_command(output_dir: Path) -> str:
    """Return what to type to go on with a run."""
    return f"{script_command(Path(__file__))} --resume_from {shlex.quote(str(output_dir))}"


def report(result: TrainResult, base_model: str) -> None:
    """Say where things lie, and what to type next."""
    if result.interrupted:
        click.echo(f"stopped after {result.steps} steps; saved in {result.latest}; to go on:")
        click.echo(f"  {resume_command(result.output_dir)}")
        return
    click.echo(f"done    {result.steps} steps in {result.seconds:.0f} s; heads in {result.best}")
    click.echo(f"curves  {result.output_dir / 'training.png'}; all figures: {result.output_dir / 'metrics.jsonl'}")
    click.echo("now     measure what they bring, with")
    paths = f"MODEL_PATH={shlex.quote(base_model)} MEDUSA_WEIGHTS_PATH={shlex.quote(str(result.best))}"
    click.echo(f"  {paths} {script_command(ROOT / 'main.py')} bench")


@click.command()
@train_options
def main(**values: Any) -> None:
    """Train Medusa heads for a GGUF file."""
    options = TrainOptions(**values)
    if not options.base_model_path:
        options = replace(options, base_model_path=str(Settings.load().model_path))
    options = absolute(options)
    result = train(options)
    if ranks_asked_for().first:
        report(result, options.base_model_path)
    if result.interrupted:
        sys.exit(130)


def run() -> None:
    """Run the command."""
    run_command(main, "stopped; the same command goes on with the states that are finished")


if __name__ == "__main__":
    run()

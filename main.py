"""The command line: generate, bench, tune, verify, demo. Settings come from environment variables (config.py)."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would fight llama.cpp's (DESIGN: 8 times slower)

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))
from config import HEADS_FOLDER, ROOT, Settings
from model.decoding.generation import Request
from model.decoding.sampling import SamplingParams
from model.engine import Decoder, Engine, EngineOptions
from model.errors import MedusaError, UsageError
from model.measuring.report import check_writable, chrome_trace, facts, read_prompts, stages, table, write_json
from model.measuring.tuning import BRANCH, Tuning, live_decoder, tuned
from model.trees.tree import Tree

PROMPTS = ROOT / "benchmarks" / "prompts"
DEMO_TOKENS_PER_MINUTE = 100_000  # states once and three epochs, on two cores


class Commands(click.Group):
    """Turns our errors into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except MedusaError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except (KeyboardInterrupt, click.Abort):
            click.echo("stopped", err=True)
            sys.exit(130)


@click.group(cls=Commands, context_settings={"show_default": True, "max_content_width": 120})
def cli() -> None:
    """Speculative decoding with Medusa heads for any GGUF. MODEL_PATH names the model."""


def open_engine(settings: Settings, weights: Path | None = None) -> Engine:
    """Load the model that the environment names, with its heads or those named here."""
    logging.basicConfig(level=settings.log_level, format="%(message)s")
    options = EngineOptions(
        settings.n_threads,
        settings.model_context_size,
        settings.n_gpu_layers,
        settings.use_mmap,
        settings.use_mlock,
        settings.flash_attn,
        settings.kv_type,
        settings.medusa_k_heads,
        settings.medusa_max_tokens_per_step,
    )
    return Engine(settings.model_path, options, weights or settings.medusa_weights_path, HEADS_FOLDER)


def tune_engine(engine: Engine, sampling: SamplingParams, draft: str, draft_vocab: int) -> Tuning:
    """Return what this machine's steps cost and its guesses win: measured once for model, heads and machine."""
    return tuned(
        engine,
        trial_requests(engine, sampling),
        heads=draft in ("medusa", "both"),
        draft_vocab=draft_vocab,
        told=lambda: click.echo("measuring what pays here (once for this model, heads and machine) ...", err=True),
    )


def open_decoder(
    engine: Engine, sampling: SamplingParams, *, tree_text: str, draft: str, plan: str, draft_vocab: int
) -> Decoder:
    """Make the decoder that the options ask for.

    draft "auto": from the text so far and, where the model has heads, with them; a tree that is given is drafted by
    the heads alone. plan "live": what pays now; "fixed": the same tree in every step, so that runs can be repeated.
    """
    if draft == "auto":
        draft = "medusa" if tree_text != "auto" else "both" if engine.weights is not None else "ngram"
    branch = min(BRANCH, engine.options.max_nodes - 1) if draft in ("ngram", "both") else 0
    if draft == "none":
        return engine.decoder()
    if tree_text != "auto":
        tree = engine.check_tree(Tree.parse(tree_text))
        branch = min(branch, engine.options.max_nodes - len(tree))
        return engine.decoder(tree, branch=branch, draft_vocab=draft_vocab)
    tuning = tune_engine(engine, sampling, draft, draft_vocab)
    if plan == "live":
        return live_decoder(engine, tuning, ngrams=branch > 0, draft_vocab=draft_vocab)
    best = tuning.best(tuning.curve.contexts[0], engine.options.max_nodes)
    branch = min(branch, engine.options.max_nodes - len(best.tree))
    return engine.decoder(best.tree, branch=branch, draft_vocab=draft_vocab)


def trial_requests(engine: Engine, sampling: SamplingParams) -> list[Request]:
    """Return the requests that trees are timed on; their prompts fill half of the context at the most."""
    requests = [engine.request(p, 64, sampling=sampling) for p in read_prompts(PROMPTS / "trial.jsonl")]
    return [replace(r, prompt=r.prompt[: engine.context // 2]) for r in requests]


sampling_options = [
    click.option("--max_tokens", default=256, type=click.IntRange(1), help="New tokens at the most."),
    click.option("--temperature", default=0.0, help="0 is greedy."),
    click.option(
        "--tree",
        "tree_text",
        default="auto",
        help="Chain length (4), widths (2,2,1), a JSON file of rank "
        "paths, or auto: what pays on this machine, possibly nothing.",
    ),
    click.option(
        "--draft",
        type=click.Choice(["auto", "medusa", "ngram", "both", "none"]),
        default="auto",
        help="Who drafts: the heads, the text so far, both, nobody; auto: whoever is there.",
    ),
    click.option(
        "--plan",
        type=click.Choice(["live", "fixed"]),
        default="live",
        help="With an auto tree: adapt it while writing, or keep it, so that runs can be repeated.",
    ),
    click.option(
        "--draft_vocab", default=0, type=click.IntRange(0), help="Draft the N most frequent tokens only; 0: all."
    ),
]

prompts_option = click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    default=PROMPTS / "python.jsonl",
    help=".jsonl or .txt",
    show_default="held-out Python",
)


def with_sampling(command: Any) -> Any:
    """Add the options that several commands share."""
    for option in reversed(sampling_options):
        command = option(command)
    return command


@cli.command()
@click.argument("prompt")
@with_sampling
@click.option("--top_p", default=1.0)
@click.option("--top_k", default=0)
@click.option("--seed", default=0)
@click.option("--stop", multiple=True, help="End the text before this string; may be given several times.")
@click.option("--stream", is_flag=True, help="Print the text as it is written.")
def generate(
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    stream: bool,
    **drafting: Any,
) -> None:
    """Continue PROMPT."""
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    engine = open_engine(Settings.load())
    request = engine.request(prompt, max_tokens, sampling=sampling, stop=stop)
    decoder = open_decoder(engine, sampling, **drafting)
    generation = decoder.start(request)
    text = []
    for piece in generation:
        text.append(piece)
        if stream:
            click.echo(piece, nl=False)
    click.echo("" if stream else "".join(text))
    stats = generation.slot.stats
    click.echo(
        f"{len(generation.tokens)} tokens, {len(generation.tokens) / stats.seconds:.1f} tokens/s, acceptance length "
        f"{stats.acceptance_length:.2f}, {sum(stats.drafted) / max(stats.steps, 1):.1f} nodes drafted a step, "
        f"{generation.finish_reason}",
        err=True,
    )


@cli.command()
@prompts_option
@with_sampling
@click.option("--runs", default=3, type=click.IntRange(1), help="Every prompt so many times each way.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--profile", is_flag=True, help="Show where the time of a step goes.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write the first text's steps for chrome://tracing.")
def bench(
    prompts: Path,
    max_tokens: int,
    temperature: float,
    runs: int,
    json_path: Path | None,
    profile: bool,
    trace: Path | None,
    **drafting: Any,
) -> None:
    """Time plain decoding and Medusa in turn, in one process."""
    from model.measuring.speed import compare

    check_writable(json_path)
    check_writable(trace)
    engine = open_engine(Settings.load())
    sampling = SamplingParams(temperature)
    requests = [
        engine.request(p, max_tokens, sampling=replace(sampling, seed=i)) for i, p in enumerate(read_prompts(prompts))
    ]
    with open_decoder(engine, sampling, **drafting) as medusa:
        result = compare(engine, requests, medusa, runs=runs)
        if trace:
            generation = medusa.start(requests[0])
            generation.slot.stats.timeline = []
            generation.run()
            write_json(trace, chrome_trace(generation.slot.stats.timeline))
    del result["text_pairs"]
    result |= {"temperature": temperature, "max_tokens": max_tokens, "runs": runs, **drafting}
    click.echo(table([result]))
    if profile:
        click.echo(stages(result))
    for d in result["divergences"]:
        click.echo(f"prompt {d['prompt']} parts from the plain text at token {d['position']}, by {d['margin']:.4f}")
    if json_path:
        write_json(json_path, {**facts(engine), **result})


@cli.command()
@prompts_option
@click.option("--temperature", default=0.0, help="0 is greedy.")
@click.option("--draft_vocab", default=0, type=click.IntRange(0), help="As for generate and bench.")
@click.option(
    "--max_tokens", default=96, type=click.IntRange(16), help="New tokens per text, to measure the best tree."
)
@click.option("--n_prompts", default=6, type=click.IntRange(1), help="Measure on the first so many prompts.")
@click.option("--png", default="tune.png", type=click.Path(path_type=Path), help="Where the picture goes.")
def tune(prompts: Path, temperature: float, draft_vocab: int, max_tokens: int, n_prompts: int, png: Path) -> None:
    """Measure what a step costs here, find the tree that pays, and try it."""
    from model.measuring.speed import compare
    from model.measuring.tuning_report import draw
    from model.measuring.tuning_report import table as tuning_table

    check_writable(png)
    engine, sampling = open_engine(Settings.load()), SamplingParams(temperature)
    heads = engine.weights is not None
    if not heads:
        click.echo(f"no heads for {engine.file.name}: only the text so far can draft", err=True)
    tuning = tuned(
        engine, trial_requests(engine, sampling), heads=heads, draft_vocab=draft_vocab, afresh=True, budget_s=3.0
    )
    choices = tuning.choices(tuning.curve.contexts[0], engine.options.max_nodes)
    best = tuning.best(tuning.curve.contexts[0], engine.options.max_nodes)
    click.echo(f"{engine.file.name} ({engine.file.file_type}), {engine.options.n_threads} threads")
    click.echo(tuning_table(tuning, choices, best))
    requests = [
        engine.request(p, max_tokens, sampling=replace(sampling, seed=i))
        for i, p in enumerate(read_prompts(prompts)[:n_prompts])
    ]
    for name in ("this tree in every step", "the live plan"):
        if name == "the live plan":
            medusa = live_decoder(engine, tuning, ngrams=True, draft_vocab=draft_vocab)
        elif len(best.tree) == 1:
            continue
        else:
            medusa = engine.decoder(best.tree, draft_vocab=draft_vocab)
        with medusa:
            result = compare(engine, requests, medusa, runs=1)
        click.echo(
            f"measured on {len(requests)} prompts, {name}: {result['speedup']:.2f}x, "
            f"{result['acceptance_length']:.2f} tokens a step, {result['tree_nodes'] - 1:.1f} drafted"
        )
    draw(png, tuning, choices, best)
    click.echo(f"picture: {png}")


@cli.command()
@prompts_option
@click.option("--n_prompts", default=8, type=click.IntRange(1), help="Use the first so many.")
@click.option("--max_tokens", default=96, type=click.IntRange(16), help="New tokens per text at the most.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def verify(prompts: Path, n_prompts: int, max_tokens: int, json_path: Path | None) -> None:
    """Prove that drafting leaves the text alone, and that the proof would notice if it did not."""
    from model.measuring.proofs import controls, prove

    check_writable(json_path)
    engine = open_engine(Settings.load())
    texts = read_prompts(prompts)[:n_prompts]
    trees = [Tree.chain(min(3, engine.n_heads)), bushy_tree(engine)]
    cases: list[dict[str, Any]] = []
    for temperature in (0.0, 0.8):
        requests = [
            engine.request(t, max_tokens, sampling=SamplingParams(temperature, seed=i)) for i, t in enumerate(texts)
        ]
        for case in prove(engine, requests, trees):
            chains = "" if case.chains_equal is None else f"bit-equal chains {case.chains_equal}/{case.texts}, "
            click.echo(
                f"{'ok  ' if case.holds else 'FAIL'} temperature {temperature}, {case.name}: replayed "
                f"{case.replayed}/{case.texts} (off by {case.worst_difference:.1f} noise floors), {chains}equal to "
                f"plain {case.plain_equal}/{case.texts}, {case.acceptance_length:.2f} tokens a step"
            )
            cases.append({"temperature": temperature, **asdict(case), "holds": case.holds})
    noticed = controls(engine, [engine.request(t, max_tokens) for t in texts[:3]], trees[1])
    for name, answers in noticed.items():
        caught = [answer for answer in answers if answer]
        click.echo(
            f"{'ok  ' if caught else 'FAIL'} control, {name}: noticed in {len(caught)}/{len(answers)} texts "
            f"({'; '.join(caught) or 'not at all'})"
        )
    held = all(c["holds"] for c in cases) and all(any(answers) for answers in noticed.values())
    if json_path:
        write_json(json_path, {**facts(engine), "holds": held, "cases": cases, "controls": noticed})
    if not held:
        click.echo("a proof failed or a fault went unnoticed", err=True)
        sys.exit(1)


def bushy_tree(engine: Engine) -> Tree:
    """Return a tree with siblings at every depth, as large as heads and limit allow."""
    for widths in ([3, 2, 2], [2, 2, 2], [2, 2], [2]):
        tree = Tree.product(widths)
        if tree.max_depth <= engine.n_heads and len(tree) <= engine.options.max_nodes:
            return tree
    raise UsageError("verify needs a tree of 3 nodes or more; raise MEDUSA_MAX_TOKENS_PER_STEP")


@cli.command()
@click.option("--minutes", default=5.0, type=click.FloatRange(0.1), help="Roughly how long to train.")
@click.option("--max_tokens", default=160, type=click.IntRange(1), help="New tokens per text.")
@click.option("--n_prompts", default=12, type=click.IntRange(1), help="Held-out prompts to write for.")
def demo(minutes: float, max_tokens: int, n_prompts: int) -> None:
    """Train heads for the bundled model from scratch and watch what they bring."""
    from model.measuring.speed import compare
    from model.train_medusa import train
    from model.training.options import TrainOptions

    settings = Settings.load()
    output = HEADS_FOLDER / "demo"
    click.echo(f"1. Training four heads for {settings.model_path.name}, about {minutes:.0f} minutes on two cores")
    result = train(
        TrainOptions(
            base_model_path=str(settings.model_path),
            k_heads=4,
            max_tokens=int(minutes * DEMO_TOKENS_PER_MINUTE),
            max_length=512,
            learning_rate=2e-3,
            output_dir=str(output),
        ),
        overwrite=True,
    )
    if result.interrupted:
        click.echo("stopped; `make demo` starts afresh")
        sys.exit(130)
    click.echo(f"\n2. Plain decoding and Medusa, in turn, on {n_prompts} held-out prompts")
    engine = open_engine(settings, result.best)
    texts = read_prompts(PROMPTS / "python.jsonl")[:n_prompts]
    results = []
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature)
        requests = [engine.request(p, max_tokens, sampling=replace(sampling, seed=i)) for i, p in enumerate(texts)]
        with live_decoder(engine, tune_engine(engine, sampling, "both", 0), ngrams=True) as medusa:
            results.append({"temperature": temperature, **compare(engine, requests, medusa)})
    click.echo("\n" + table(results))
    plain, medusa = results[0]["text_pairs"][0]
    click.echo(f"\nThe first text, {'the same both ways' if plain == medusa else 'which parts at a near-tie'}:\n")
    click.echo("   " + texts[0].rstrip().replace("\n", "\n   ").splitlines()[-1])
    click.echo("   " + medusa.rstrip().replace("\n", "\n   "))
    click.echo(
        "\nA model this small fits into the processor's cache, where checking 4 tokens costs twice as much as one:\n"
        "little can be won. Large models wait for memory, where 4 tokens cost little more than one: they gain more.\n"
        f"\nCurves: {os.path.relpath(output / 'training.png')}\n"
        "For a GGUF of your own:\n"
        "  .venv/bin/python model/train_medusa.py --base_model_path YOURS.gguf --dataset_name YOUR_CHATS.jsonl\n"
        '  MODEL_PATH=YOURS.gguf .venv/bin/python main.py generate "Once upon a time" --stream'
    )


if __name__ == "__main__":
    cli()

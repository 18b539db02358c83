"""The cases of speed.py: kinds of prompts, and the decoders that take turns on them.

Knows no figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from model.decoding.decoder import Decoder
from model.decoding.drafters.drafter import HEADS, RandomDrafter
from model.decoding.drafters.sources import FREE
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.loaded_model import LoadedModel
from model.planning.auto_tuning import Tuning, adaptive_decoder
from model.planning.prompt_files import PYTHON, PYTHON_TRIALS, read_prompt_file
from model.trees.tree import Tree

ROOT = Path(__file__).resolve().parents[1]
MAX_SWEEP_NODES = 16


def prompts_for(kind: str) -> list[str]:
    """Return the prompts of a kind."""
    if kind == "trial":
        return read_prompt_file(PYTHON_TRIALS)
    held_out = read_prompt_file(PYTHON)
    if kind == "copying":  # a text, and its beginning once more
        return [f"{text}\n\n\n{text[: len(text) // 3]}" for text in held_out]
    if kind == "foreign":  # English, for a model of Python
        paragraphs = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
        return [text for text in paragraphs if len(text) > 200]
    if kind == "long":
        return ["\n\n\n".join(held_out[i : i + 4]) for i in range(0, len(held_out), 2)]
    return held_out


def requests_for(
    loaded: LoadedModel, kind: str, temperature: float, n: int, max_tokens: int
) -> list[Request]:
    """Return requests for the first n prompts of a kind, each with a seed of its own.

    Long prompts are cut to fit the context.
    """
    room = loaded.context - max_tokens
    requests = list[Request]()
    for i, prompt in enumerate(prompts_for(kind)[:n]):
        sampling = SamplingParams(temperature=temperature, seed=i)
        request = loaded.request(prompt, max_tokens, sampling)
        requests.append(replace(request, prompt=request.prompt[:room]))
    return requests


def describe_fixed(tree: Tree, label: str = "") -> str:
    """Return the name of a tree of the heads that is drafted in every step."""
    return f"heads{label}, {len(tree) - 1} fixed"


def best_tree(loaded: LoadedModel, tuning: Tuning) -> Tree:
    """Return the heads' tree that pays best; the root alone where none does."""
    return tuning.best(tuning.curve.contexts[0], loaded.options.max_nodes).tree


def cases(
    loaded: LoadedModel, tuning: Tuning, what: str
) -> Iterator[tuple[str, dict[str, Decoder]]]:
    """Yield a kind of prompts, and the decoders that take turns on them by name."""
    if what == "sweep":
        yield "python", sweep(loaded, tuning)
    elif what == "worst":
        useless = {
            "useless heads": adaptive_decoder(loaded, tuning, ()),
            "useless heads and free sources": adaptive_decoder(loaded, tuning, FREE),
        }
        for decoder in useless.values():
            if HEADS in decoder.drafters.trees:
                at_random = {HEADS: RandomDrafter(loaded.file.n_vocab)}
                decoder.drafters = replace(decoder.drafters, trees=at_random)
        yield "python", useless
        for kind in ("foreign", "long"):
            yield kind, {f"all sources, {kind} prompts": adaptive_decoder(loaded, tuning, FREE)}
    elif what == "copying":
        without_heads = replace(tuning, draft_s=[], accuracies=[])
        yield (
            "copying",
            {
                "heads": adaptive_decoder(loaded, tuning, ()),
                "free sources": adaptive_decoder(loaded, without_heads, FREE),
                "all sources": adaptive_decoder(loaded, tuning, FREE),
            },
        )
    else:
        decoders = dict[str, Decoder]()
        tree = best_tree(loaded, tuning)
        if len(tree) > 1:
            decoders[describe_fixed(tree)] = loaded.fixed_decoder(tree)
        decoders["all sources"] = adaptive_decoder(loaded, tuning, FREE)
        yield "python", decoders


def sweep(loaded: LoadedModel, tuning: Tuning) -> dict[str, Decoder]:
    """Return a decoder for the best tree of each size."""
    best = best_tree(loaded, tuning)
    max_nodes = min(loaded.options.max_nodes, MAX_SWEEP_NODES)
    decoders = dict[str, Decoder]()
    for choice in tuning.choices(tuning.curve.contexts[0], max_nodes)[1:]:
        name = describe_fixed(choice.tree)
        if choice.tree.paths == best.paths:
            name += ", the tuned one"
        decoders[name] = loaded.fixed_decoder(choice.tree)
    return decoders

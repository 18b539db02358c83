"""A child of run_loop.py: one checkout's model and run loop, asked through stdin. Compares nothing.

    python benchmarks/run_loop_child.py CHECKOUT MODEL.gguf N_THREADS

A request a line, [case, prompt, max_tokens]; a JSON line for each on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

CHAIN = 3
CONTINUATION = 7  # tokens of n-grams: with the root eight rows
CASES = ("plain", "chain, always wrong", "n-grams")
NO_HEADS = Path("no heads")
Answer = dict[str, Any]  # tokens, text, steps, seconds, decode_s
Generate = Callable[[str, str, int], Answer]  # from a case, a prompt and the most new tokens


def former_loop(model: Path, n_threads: int) -> Generate:
    """Load the model as checkouts up to 45de5a9 do: Engine, and a Generation for each sequence."""
    engines = import_module("model.engine")
    generation: Any = import_module("model.decoding.generation")
    drafting = import_module("model.decoding.drafting")
    tree = import_module("model.trees.tree").Tree.chain(CHAIN)
    options = engines.EngineOptions(n_threads=n_threads, context_size=0)
    engine = engines.Engine(model, options, None, NO_HEADS)
    wrong = drafting.ConstantDrafter(max(engine.model.bos, 0))
    decoders = [engine.decoder(), engine.decoder(tree, wrong), engine.decoder(branch=CONTINUATION)]
    by_case = dict(zip(CASES, decoders, strict=True))
    prefill = generation.prefill
    prefilled_at = 0.0

    def noted_prefill(*args: Any) -> None:
        nonlocal prefilled_at
        prefill(*args)
        prefilled_at = perf_counter()

    generation.prefill = noted_prefill

    def generate(case: str, prompt: str, max_tokens: int) -> Answer:
        sequence = by_case[case].start(engine.request(prompt, max_tokens))
        pieces = list(sequence)
        text = "".join(pieces)
        seconds = perf_counter() - prefilled_at
        stats = sequence.slot.stats
        return {
            "tokens": sequence.tokens,
            "text": text,
            "steps": stats.steps,
            "seconds": seconds,
            "decode_s": stats.decode_s,
        }

    return generate


def present_loop(model: Path, n_threads: int) -> Generate:
    """Load the model as this checkout does: LoadedModel, and a Scheduler for each decoder."""
    from model.decoding.drafters.drafter import ConstantDrafter
    from model.decoding.sampling import SamplingParams
    from model.loaded_model import LoadedModel, LoadOptions
    from model.trees.tree import Tree

    options = LoadOptions(n_threads=n_threads, n_gpu_layers=0)
    loaded = LoadedModel(model, options, heads_folder=NO_HEADS)
    wrong = ConstantDrafter(max(loaded.base_model.bos, 0))
    decoders = [
        loaded.fixed_decoder(),
        loaded.fixed_decoder(Tree.chain(CHAIN), wrong),
        loaded.fixed_decoder(continuation=CONTINUATION),
    ]
    by_case = dict(zip(CASES, decoders, strict=True))

    def generate(case: str, prompt: str, max_tokens: int) -> Answer:
        decoder = by_case[case]
        sequence = decoder.start(loaded.request(prompt, max_tokens, SamplingParams()))
        pieces = [output.text for output in decoder.stream(sequence)]
        text = "".join(pieces)
        seconds = perf_counter() - sequence.prefilled_at
        statistics = sequence.statistics
        return {
            "tokens": sequence.new_tokens,
            "text": text,
            "steps": statistics.steps,
            "seconds": seconds,
            "decode_s": statistics.seconds_by_stage["decode"],
        }

    return generate


def main() -> None:
    """Load the model of a checkout and answer requests until there are no more."""
    checkout, model, n_threads = sys.argv[1:]
    sys.path[0] = checkout
    is_former = (Path(checkout) / "model" / "decoding" / "generation.py").exists()
    load = former_loop if is_former else present_loop
    generate = load(Path(model), int(n_threads))
    for line in sys.stdin:
        print(json.dumps(generate(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

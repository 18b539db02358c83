"""What does the run loop cost, against the one of another checkout?

    git worktree add ../before 45de5a9    # before the scheduler ran single sequences too
    python benchmarks/run_loop.py --before ../before [--rounds 15] [--threads 1]

A child process for each checkout loads the model once; then both are asked in turn for the
same sequences, greedily: without drafts, with a chain of three that is always wrong, and with
n-grams. Seconds are those of the whole loop, from the end of the prefill to the end of the
sequence, text collected, per step. Ratios are this checkout's ÷ the other's, medians over rounds;
what is not llama_decode's is reported beside them. Writes JSON to benchmarks/results/run_loop.json.
With `--before .` it compares the checkout with itself, which shows how far noise alone goes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import click  # noqa: E402

from benchmarks.run_loop_child import CASES, Answer  # noqa: E402
from model.base.known_models import BUNDLED  # noqa: E402
from model.evaluation.report import write_json  # noqa: E402
from model.planning.prompt_files import PYTHON, read_prompt_file  # noqa: E402

CHILD = Path(__file__).with_name("run_loop_child.py")
PROMPT_CHARS = 400  # of each prompt: prefills are not measured


class Child:
    """The process of a checkout."""

    def __init__(self, checkout: Path, model: Path, n_threads: int) -> None:
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "GOMP_SPINCOUNT": "300000"}
        command = [sys.executable, str(CHILD), str(checkout), str(model), str(n_threads)]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # ends its input, and waits

    def generate(self, *request: str | int) -> Answer:
        """Have a sequence generated."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the child of {self._process.args!r} died")
        answer: Answer = json.loads(line)
        return answer


def per_step_us(answers: list[Answer], key: str = "seconds") -> float:
    """Return the microseconds per step of some sequences together."""
    seconds = sum(answer[key] for answer in answers)
    return float(1e6 * seconds / sum(answer["steps"] for answer in answers))


def outside_us(answers: list[Answer]) -> float:
    """Return the microseconds per step that are not llama_decode's."""
    return per_step_us(answers) - per_step_us(answers, "decode_s")


def figures(rounds: list[list[Answer]]) -> dict[str, float]:
    """Return one side's medians over rounds."""
    return {
        "step_us": median(per_step_us(answers) for answers in rounds),
        "outside_decode_us": median(outside_us(answers) for answers in rounds),
        "outside_decode_share": median(
            outside_us(answers) / per_step_us(answers) for answers in rounds
        ),
    }


def compare(before: list[list[Answer]], after: list[list[Answer]]) -> dict[str, Any]:
    """Return the figures of a case from the answers of each round.

    added_outside_decode: what came to the time outside llama_decode, as a share of a step before:
    the noise of llama_decode, most of it on a busy machine, is not in it.
    """
    rounds = list(zip(before, after, strict=True))
    ratios = [per_step_us(a) / per_step_us(b) for b, a in rounds]
    added = [(outside_us(a) - outside_us(b)) / per_step_us(b) for b, a in rounds]
    pairs = zip(before[-1], after[-1], strict=True)
    same = all(b[key] == a[key] for b, a in pairs for key in ("tokens", "text", "steps"))
    return {
        "ratio": median(ratios),
        "ratios": ratios,
        "added_outside_decode": median(added),
        "same_output_and_steps": same,
        "before": figures(before),
        "after": figures(after),
    }


def measure_case(
    sides: tuple[Child, Child], case: str, prompts: list[str], max_tokens: int, rounds: int
) -> dict[str, Any]:
    """Ask both sides in turn, sequence by sequence; who goes first changes."""
    before = list[list[Answer]]()  # by round
    after = list[list[Answer]]()
    for n in range(rounds + 1):
        before.append([])
        after.append([])
        for i, prompt in enumerate(prompts):
            order = [(sides[0], before[-1]), (sides[1], after[-1])]
            if (n + i) % 2:
                order.reverse()
            for side, answers in order:
                answers.append(side.generate(case, prompt, max_tokens))
    return compare(before[1:], after[1:])  # the first round warms up


def commit(checkout: Path) -> str:
    """Return the commit of a checkout, with a + where files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe(case: str, result: dict[str, Any]) -> str:
    """Return a case's figures as a line of text."""
    before = result["before"]
    after = result["after"]
    same = "same output" if result["same_output_and_steps"] else "OTHER OUTPUT"
    return (
        f"{case:20} {before['step_us']:7.0f} -> {after['step_us']:7.0f} us a step, "
        f"ratio {result['ratio']:.3f}; outside llama_decode {before['outside_decode_us']:.0f} us "
        f"({before['outside_decode_share']:.1%}) -> {after['outside_decode_us']:.0f} us "
        f"({after['outside_decode_share']:.1%}), {result['added_outside_decode']:+.1%} of a step; "
        f"{same}"
    )


@click.command()
@click.option("--before", required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--model", default=BUNDLED, type=click.Path(path_type=Path, exists=True), show_default="bundled"
)
@click.option("--rounds", default=15, show_default=True)
@click.option("--n_prompts", default=4, show_default=True)
@click.option("--max_tokens", default=96, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "run_loop.json",
)
def main(
    before: Path, model: Path, rounds: int, n_prompts: int, max_tokens: int, threads: int, out: Path
) -> None:
    """Compare the run loops of two checkouts."""
    before = before.resolve()
    prompts = [text[:PROMPT_CHARS] for text in read_prompt_file(PYTHON)[:n_prompts]]
    results = dict[str, Any]()
    with Child(before, model, threads) as former, Child(ROOT, model, threads) as present:
        for case in CASES:
            results[case] = measure_case((former, present), case, prompts, max_tokens, rounds)
            click.echo(describe(case, results[case]))
    content = {
        "command": f"python benchmarks/run_loop.py --before {os.path.relpath(before, ROOT)} "
        f"--model {model.name} --rounds {rounds} --threads {threads}",
        "commits": {"before": commit(before), "after": commit(ROOT)},
        "model": model.name,
        "threads": threads,
        "rounds": rounds,
        "n_prompts": n_prompts,
        "max_tokens": max_tokens,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("llama-cpp-python", "numpy")},
        "cases": results,
    }
    write_json(out, content)


if __name__ == "__main__":
    main()

"""The commands, as a user types them."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import commands.demo as demo_command
from commands.common import draft_options
from config import ROOT
from main import cli
from model.base import known_models
from model.base.known_models import TINY_PYTHON
from model.evaluation.speed_report import draw, rows_of, table
from model.heads.known_heads import HEADS_FOLDER
from model.planning.choice import DraftOptions
from model.storage import facts


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for all tests of this file: what was measured once is known to the others."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(facts, "folder", lambda: cache)


def call(*words: str, **env: str) -> Result:
    return CliRunner().invoke(cli, list(words), env={"N_THREADS": "1", **env})


def test_generate_from_any_directory(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        "generate",
        "import os\n",
        "--max_tokens",
        "12",
        "--tree",
        "2",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "N_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (
        "12 tokens" in done.stderr and "nodes drafted a step" in done.stderr and done.stdout.strip()
    )


def test_drafting_and_streaming_leave_the_output_alone() -> None:
    words = ("generate", "def f(x):\n", "--max_tokens", "30", "--temperature", "0.7", "--seed", "5")
    plain = call(*words, "--draft", "none")
    drafted = call(*words, "--tree", "3", "--stream")
    assert plain.exit_code == drafted.exit_code == 0 and plain.stdout == drafted.stdout
    assert call(*words[:-1], "6", "--draft", "none").stdout != plain.stdout


def test_auto_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "folder", lambda: tmp_path / "cache")
    words = ("generate", "def f(x):\n", "--max_tokens", "8")
    assert "measuring" in call(*words).stderr and "measuring" not in call(*words).stderr


@pytest.mark.parametrize("draft", ["heads", "ngram", "both", "none", "medusa"])
@pytest.mark.parametrize("policy", ["adaptive", "fixed", "live"])
def test_all_draft_sources_and_policies_generate(draft: str, policy: str) -> None:
    """`medusa`, `live` and `--plan` are names of before."""
    done = call(
        "generate",
        "import os\nimport sys\n",
        "--max_tokens",
        "48",
        "--draft",
        draft,
        "--plan" if policy == "live" else "--policy",
        policy,
    )
    assert done.exit_code == 0 and "48 tokens" in done.stderr, done.output
    nodes = float(done.stderr.split(" nodes drafted")[0].split()[-1])
    assert nodes == 0 or draft != "none"
    assert nodes > 0 or (draft, policy) != ("ngram", "fixed")


@pytest.mark.parametrize(
    ("policy", "draft", "as_now"),
    [
        ("live", "medusa", DraftOptions(sources="heads")),
        ("adaptive", "heads", DraftOptions(sources="heads")),
        ("fixed", "auto", DraftOptions(fixed=True)),
    ],
)
def test_names_of_before_mean_what_they_meant(
    policy: str, draft: str, as_now: DraftOptions
) -> None:
    assert draft_options(policy=policy, draft=draft) == as_now


def test_a_model_without_heads_drafts_from_ngrams(foreign_gguf: Path) -> None:
    prompt = "a a a a a a a a"
    model = {"MODEL_PATH": str(foreign_gguf)}
    done = call("generate", prompt, "--max_tokens", "40", **model)
    assert done.exit_code == 0 and "40 tokens" in done.stderr, done.output
    refused = call("generate", "a", "--draft", "both", **model)
    assert refused.exit_code == 2 and "no heads" in refused.stderr


def test_stop_and_draft_vocab() -> None:
    whole = call("generate", "import ", "--max_tokens", "40", "--draft", "none").stdout
    cut = call(
        "generate",
        "import ",
        "--max_tokens",
        "40",
        "--tree",
        "2",
        "--draft_vocab",
        "512",
        "--stop",
        "\n",
    ).stdout
    assert cut == whole.split("\n")[0] + "\n"


def _values(counts: Any) -> Iterator[int]:
    """Return the counts of a list, or of an object whose keys are numbers."""
    return iter(counts.values() if isinstance(counts, dict) else counts)


def test_bench_writes_every_figure(tmp_path: Path) -> None:
    rows = [("imports", "import os\n"), ("code", "def main():\n"), ("imports", "import re\n")]
    lines = [json.dumps({"kind": kind, "prompt": prompt}) for kind, prompt in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.json"
    done = call(
        "bench",
        "--n_prompts",
        "3",
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--max_tokens",
        "16",
        "--runs",
        "1",
        "--tree",
        "2",
        "--json",
        str(out),
        "--png",
        str(tmp_path / "bench.png"),
        "--profile",
        "--trace",
        str(tmp_path / "trace.json"),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events[:6]] == list(result["stages_us"]) and "decode" in done.output
    assert all(b["ts"] >= a["ts"] + a["dur"] - 1 for a, b in itertools.pairwise(events)), (
        "one after the other"
    )
    assert sum(result["stages_us"].values()) == pytest.approx(
        sum(result[f"{part}_us"] for part in ("draft", "decode", "verify", "other"))
    )
    wanted = {
        "plain",
        "drafted",
        "by_source",
        "steps_by_depth",
        "medusa",
        "head_steps",
        "branch_share",
        "speedup",
        "acceptance_length",
        "acceptance_rate_per_depth",
        "tree_nodes",
        "draft_us",
        "verify_us",
        "other_us",
        "equal_sequences",
        "sequences",
        "divergences",
        "repeated_8grams",
        "model",
        "quantization",
        "threads",
        "versions",
    }
    assert wanted <= result.keys() and result["sequences"] == 3
    kinds = result["by_kind"]
    assert [(kind, row["sequences"]) for kind, row in kinds.items()] == [
        ("imports", 2),
        ("code", 1),
    ]
    for name in ("drafted_per_depth", "steps_by_depth"):
        counts = [sum(_values(row[name])) for row in kinds.values()]
        assert sum(counts) == sum(_values(result[name])) > 0, name
    assert "imports" in done.stdout and "overall" in done.stdout
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert result["speedup"] == pytest.approx(
        result["drafted"]["tokens_per_s"] / result["plain"]["tokens_per_s"], rel=0.01
    )
    assert result["medusa"] == result["drafted"], "the name of before"
    assert result["head_steps"] == result["steps_by_depth"]


def test_verify_exits_with_0_when_all_holds_and_1_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "v.json"
    words = ("verify", "--n_prompts", "1", "--max_tokens", "24", "--json", str(out))
    done = call(*words)
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["holds"] is True and "FAIL" not in done.output
    # Where all shapes of batches round alike, nothing differs: that is too much, too.
    monkeypatch.setattr("model.evaluation.replay.NOISE", -1.0)
    done = call(*words)
    assert (
        done.exit_code == 1
        and "FAIL" in done.output
        and json.loads(out.read_text())["holds"] is False
    )


@pytest.mark.parametrize(
    ("env", "words", "said"),
    [
        ({"MODEL_PATH": "nowhere.gguf"}, ["generate", "x"], "nowhere.gguf"),
        ({"N_THREADS": "many"}, ["generate", "x"], "N_THREADS='many'"),
        ({"MEDUSA_WEIGHTS_PATH": "nowhere"}, ["generate", "x"], "nowhere"),
        ({}, ["generate", "x", "--tree", "99"], "99 deep"),
        ({}, ["generate", "x", "--tree", "no.json"], "no.json"),
        ({}, ["generate", "x", "--temperature", "-1"], "temperature -1.0"),
        (
            {"MODEL_CONTEXT_SIZE": "16"},
            ["generate", "x = 1\n" * 30, "--tree", "1"],
            "the context 16",
        ),
        ({}, ["bench", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (
            {"MODEL_PATH": "FOREIGN"},
            ["generate", "x", "--tree", "4"],
            "has no heads, and only they draft trees",
        ),
        (
            {},
            [
                "bench",
                "--tree",
                "1",
                "--runs",
                "1",
                "--max_tokens",
                "1",
                "--json",
                "/nowhere/x.json",
            ],
            "/nowhere/x.json",
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    env: dict[str, str], words: list[str], said: str, foreign_gguf: Path
) -> None:
    done = call(
        *words,
        **{name: str(foreign_gguf) if value == "FOREIGN" else value for name, value in env.items()},
    )
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize(("kind", "head_type"), [("F32", "hydra"), ("Q8_0", "medusa")])
def test_a_model_that_is_not_ours(
    kind: str, head_type: str, foreign_gguf: Path, foreign_gguf_q8: Path, tmp_path: Path
) -> None:
    """Other vocabulary, grouped-query attention, other types: the same commands."""
    gguf = foreign_gguf if kind == "F32" else foreign_gguf_q8
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    heads = tmp_path / "heads"
    options = {
        "--base_model_path": gguf,
        "--epochs": 1,
        "--k_heads": 3,
        "--head_type": head_type,
        "--dataset_name": tmp_path / "text.txt",
        "--max_length": 64,
        "--output_dir": heads,
        "--cache_dir": tmp_path / "states",
    }
    train = [sys.executable, str(ROOT / "model" / "train_medusa.py")]
    for name, value in options.items():
        train += [name, str(value)]
    one_thread = {**os.environ, "N_THREADS": "1"}
    done = subprocess.run(train, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    env = {"MODEL_PATH": str(gguf), "MEDUSA_WEIGHTS_PATH": str(heads / "medusa_heads_best")}
    words = ("generate", "def f(", "--max_tokens", "20")
    assert (
        call(*words, "--tree", "2,2", **env).stdout
        == call(*words, "--draft", "none", **env).stdout
        != ""
    )
    verified = call("verify", "--n_prompts", "2", "--max_tokens", "48", **env)
    assert verified.exit_code == 0, verified.output


def figures(**other: Any) -> dict[str, Any]:
    return {
        "plain": {"tokens_per_s": 10.0},
        "drafted": {"tokens_per_s": 15.0},
        "speedup": 1.5,
        "speedup_by_run": [1.5, 1.4],
        "acceptance_length": 2.0,
        "tree_nodes": 4.0,
        "equal_sequences": 2,
        "sequences": 2,
        "repeated_8grams": 0.1,
        "by_source": {"ngram": {"drafted": 40, "accepted": 10}},
        "acceptance_rate_per_depth": [0.4, 0.1],
        "drafted_per_depth": [20, 20],
    } | other


def test_what_a_table_of_figures_is_not_silent_about() -> None:
    header, row, note = table({"chat": figures()}).splitlines()
    columns = dict(zip(re.split("  +", header), row.split(), strict=True))
    assert columns["kind"] == "chat" and columns["speedup"] == "1.50x"
    assert (columns["ngram"], columns["depth 1"], columns["depth 2"]) == ("25%", "40%", "10%")
    assert note == "ngram, depth: share of the drafted tokens that was accepted"
    unsteady = table({"chat": figures(), "code": figures(speedup_by_run=[0.5, 2.0])})
    assert "speedups of code 0.50 to 2.00" in unsteady
    assert "near-tie" in table({"a": figures(), "b": figures(equal_sequences=1)})


def test_a_table_where_nothing_was_drafted(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {
        "by_source": {},
        "acceptance_rate_per_depth": [],
        "drafted_per_depth": [],
    }
    rows = {"chat": figures(**nothing), "code": figures()}
    lines = table(rows).splitlines()
    assert (
        lines[1].split()[7:10] == ["-", "-", "-"]
        and len(table({"a": rows["chat"]}).split("\n")) == 2
    )
    for name, some in (("some", rows), ("none", {"chat": rows["chat"]})):
        draw(tmp_path / f"{name}.png", some, "title")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_kind_of_task_is_one_row() -> None:
    result = figures(by_kind={"": figures()})
    assert list(rows_of(result)) == ["overall"]
    assert list(rows_of({**result, "by_kind": {"a": {}, "b": {}}})) == ["a", "b", "overall"]


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_prompt_is_a_users_turn_where_there_is_a_template(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    words = ("--max_tokens", "8", "--draft", "none")
    raw = call("generate", "import os", *words)
    assert "no chat template" in raw.stderr
    by_file = call("generate", "import os", *words, "--chat_template", str(tmp_path / "chat.jinja"))
    assert by_file.exit_code == 0 and "no chat template" not in by_file.stderr, by_file.output
    spelled = call("generate", "<user>import os\n<assistant>", *words, "--chat_template", "none")
    assert by_file.stdout == spelled.stdout != raw.stdout


def test_a_template_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("fine\n{{ 1 / 0 }}")
    for command in (["generate", "x"], ["bench", "--runs", "1"]):
        done = call(*command, "--chat_template", str(tmp_path / "bad.jinja"))
        assert done.exit_code == 2 and "in line 2: division by zero" in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_demo_compares_both_models_and_says_what_pays(
    bundled_f32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = HEADS_FOLDER / TINY_PYTHON
    monkeypatch.setattr(demo_command, "trained", lambda *_: heads)
    words = ("demo", "--max_tokens", "8", "--n_prompts", "4")
    done = call(*words, MODEL_PATH=str(bundled_f32))
    assert done.exit_code == 0, done.output
    assert "has no chat template" in done.stderr
    _, second, third = re.split(r"(?m)^[23]\. ", done.stdout)
    for part, kinds in ((second, ()), (third, demo_command.KINDS)):
        for kind in (*kinds, "overall"):
            assert re.search(rf"(?m)^{kind} +\d+ .* \d\.\d\dx ", part), (kind, part)
    assert "x overall" in third and "--hours 1" in third

    # Without a chat model, for two reasons.
    monkeypatch.setattr(demo_command, "compared", lambda *_: {})
    named = call(*words, MODEL_PATH=TINY_PYTHON)
    assert "3. Skipped: MODEL_PATH names tiny-python" in named.stdout
    monkeypatch.setattr(known_models, "smollm2_file", lambda: None)
    assert "3. Skipped: no chat model is installed" in call(*words, MODEL_PATH="").stdout

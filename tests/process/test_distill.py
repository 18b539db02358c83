"""The recipe as a command: prompts in, the model's own ids out, which training takes as is."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_endpoint import KEY, serving

from model import distill, train_medusa
from model.base.gguf_file import GGUFFile
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.loops import without_loop
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.errors import DataError
from model.training.distillation.dialogue import prompt_seed
from model.training.distillation.endpoint import Endpoint
from model.training.distillation.options import DistillOptions

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--max_new_tokens", "24", "--parallel", "4", "--prompt_tokens", "8-20"]
PROMPTS: list[Any] = [
    *({"prompt": f"def f{i}(x):\n    return"} for i in range(6)),
    {"foo": 1},
    {"text": "import os\nimport sys\nimport re\n" * 10},
    {"turns": ["class A:", "class B:"]},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in PROMPTS))
    return path


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_THREADS", "1")


def command(gguf: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return [
        "--base_model_path",
        str(gguf),
        "--prompts",
        str(prompts),
        "--output",
        str(out),
        *SMALL,
        *more,
    ]


@pytest.fixture(autouse=True)
def _no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the references have none; otherwise it is measured in each cache folder."""
    monkeypatch.setenv("FLASH_ATTENTION", "off")


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(distill.main, command(*arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def lines(path: Path) -> dict[str, dict[str, Any]]:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in read}) == len(read), "no prompt is answered twice"
    return {line["id"]: line for line in read}


def alone(model: LlamaModel, base: LlamaBase, line: dict[str, Any]) -> list[int]:
    """The answer to a recorded prompt by one-token decoding of it alone."""
    (start, _), *_ = line["answer_spans"]
    params = SamplingParams(temperature=line["temperature"], seed=prompt_seed(0, line["id"], 0))
    decoder = Decoder(base, model, FixedPolicy(), context=256)
    request = Request(prompt=line["tokens"][:start], max_tokens=24, sampling=params)
    return decoder.run(request).new_tokens


@pytest.mark.parametrize("parallel", ["1", "3", "32"])
def test_every_answer_is_the_models_own(
    foreign_gguf: Path, prompts: Path, tmp_path: Path, parallel: str
) -> None:
    """F32, so that company changes no text: each answer, greedy or sampled, is as alone."""
    out = tmp_path / "out.jsonl"
    result = run(foreign_gguf, prompts, out, "--parallel", parallel)
    found = lines(out)
    assert (
        len(found) == 8
        and "skipped: prompts.jsonl:7: no prompt in it (found: foo)" in result.stderr
    )
    model = LlamaModel(foreign_gguf)
    with LlamaBase(model, n_ctx=256, n_threads=1) as base:
        for line in found.values():
            (start, end), *_ = line["answer_spans"]
            assert line["tokens"][start:end] == alone(model, base, line)
            asked, said = (turn["value"] for turn in line["conversations"])
            assert (asked, said) == (
                model.detokenize(line["tokens"][:start]),
                model.detokenize(line["tokens"][start:end]),
            )
    assert {line["temperature"] for line in found.values()} == {0.0, 0.7}
    file = GGUFFile(foreign_gguf)
    assert {line["heads_fingerprint"] for line in found.values()} == {file.heads_fingerprint()}
    assert "train_medusa.py" in result.output and "of the 8-grams repeated" in result.output
    model.close()


def test_chats_with_the_models_own_answers(
    bundled_gguf: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(bundled_gguf, prompts, out, "--chat_template", "vicuna", "--loops", "keep")
    (chat,) = (line for key, line in lines(out).items() if key.startswith("prompts.jsonl:9-"))
    assert [turn["from"] for turn in chat["conversations"]] == ["human", "gpt"] * 2
    (a, b), (c, d) = chat["answer_spans"]
    model = LlamaModel(bundled_gguf)
    text = [model.detokenize(chat["tokens"][i:j]) for i, j in ((0, a), (a, b), (b, c), (c, d))]
    model.close()
    assert (
        text[0].strip() == "USER: class A: ASSISTANT:"
        and text[2].strip() == "USER: class B: ASSISTANT:"
    )
    assert [text[1].strip(), text[3].strip()] == [
        turn["value"] for turn in chat["conversations"][1::2]
    ]
    assert d == len(chat["tokens"])


def test_circles_are_cut_unless_they_are_wanted(bundled_gguf: Path, tmp_path: Path) -> None:
    """The bundled model at temperature 0 runs in circles."""
    source = tmp_path / "p.json"
    source.write_text(
        json.dumps(
            [
                {"prompt": f"x = [{n}, {n}, {n}, {n}, {n}, {n}, {n}, {n}, {n}, {n}, {n}, "}
                for n in range(4)
            ]
        )
    )
    found = {}
    for loops in ("keep", "cut"):
        more = ("--temperature", "0", "--loops", loops, "--max_new_tokens", "160")
        result = run(bundled_gguf, source, tmp_path / loops, *more)
        found[loops] = list(lines(tmp_path / loops).values())
    kept, cut = found["keep"], found["cut"]
    assert {line["finish_reason"] for line in kept} == {"length"}
    assert any(line["finish_reason"] == "loop" for line in cut)
    told = re.search(r"(\d+) cut where", result.output)
    assert told and int(told[1]) == sum(line["finish_reason"] == "loop" for line in cut)
    whole = {line["id"]: line for line in kept}
    for line in cut:
        (start, _), *_ = line["answer_spans"]
        said = whole[line["id"]]["tokens"][start:]
        assert (line["tokens"][start:], line["finish_reason"] == "loop") == without_loop(said)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, "its parent's"])
def test_a_stopped_run_goes_on_to_the_same_answers(
    foreign_gguf: Path, tmp_path: Path, end: signal.Signals | str
) -> None:
    """As a user does it: script, kill or Ctrl-C, the same command again, from other directories."""
    prompts, whole, out = tmp_path / "p.json", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps([{"prompt": f"x{i} = "} for i in range(60)]))
    more = ("--parallel", "2", "--max_new_tokens", "40")
    run(foreign_gguf, prompts, whole, *more)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "user-cache")}
    script = [
        sys.executable,
        str(ROOT / "model" / "distill.py"),
        *command(foreign_gguf, prompts, out, *more),
    ]
    stopped = subprocess.Popen(
        script if isinstance(end, int) else [*script, "--stop_with_stdin"],
        cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not out.exists() or out.read_text().count("\n") < 3:
        assert stopped.poll() is None
        time.sleep(0.002)
    if isinstance(end, int):
        stopped.send_signal(end)
    told = stopped.communicate(timeout=60)[1]
    before = out.read_text()
    assert 3 <= before.count("\n") < 60, "caught at work"
    if end == signal.SIGINT:
        assert stopped.returncode == 130 and "finished answers are kept" in told
        _, *again = shlex.split(told.strip().splitlines()[-1])
        subprocess.run(
            [sys.executable, *again], cwd=tmp_path, env=environment, check=True, capture_output=True
        )
    else:
        with out.open("a") as file:  # what a kill in mid-line leaves
            file.write('{"id": "torn')
        result = run(foreign_gguf, prompts, out, *more)
        assert f"60, {60 - before.count(chr(10))} to be answered" in result.output
    assert out.read_text().startswith(before), "what was finished is not done again"
    assert lines(out) == lines(whole)


def test_a_run_that_is_complete_does_nothing_and_other_options_are_refused(
    foreign_gguf: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(foreign_gguf, prompts, out, "--max_prompts", "3")
    run(foreign_gguf, prompts, out)
    before = out.read_bytes()
    assert "8, 0 to be answered" in run(foreign_gguf, prompts, out, "--parallel", "2").output
    refused = CliRunner().invoke(distill.main, command(foreign_gguf, prompts, out, "--seed", "1"))
    assert isinstance(refused.exception, DataError) and "--seed 0 then, 1 now" in str(
        refused.exception
    )
    assert out.read_bytes() == before


def test_heads_learn_from_the_answers(
    foreign_gguf: Path, foreign_gguf_q8: Path, bundled_gguf: Path, tmp_path: Path
) -> None:
    """Another quantization of the model takes the ids too, another model does not."""
    out, prompts = tmp_path / "out.jsonl", tmp_path / "p.json"
    prompts.write_text(json.dumps([{"prompt": f"x{i} = "} for i in range(12)]))
    run(foreign_gguf, prompts, out)
    places = [
        "--dataset_name",
        str(out),
        "--output_dir",
        str(tmp_path / "heads"),
        "--cache_dir",
        str(tmp_path / "c"),
    ]
    train = [*places, "--k_heads", "1", "--epochs", "1", "--max_length", "128", "--device", "cpu"]
    refused = CliRunner().invoke(
        train_medusa.main, ["--base_model_path", str(bundled_gguf), *train]
    )
    assert isinstance(refused.exception, DataError)
    names = (
        GGUFFile(foreign_gguf).heads_fingerprint()[:12],
        GGUFFile(bundled_gguf).heads_fingerprint()[:12],
    )
    assert all(name in str(refused.exception) for name in names)
    done = CliRunner().invoke(
        train_medusa.main,
        ["--base_model_path", str(foreign_gguf_q8), *train],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "heads" / "medusa_heads_best" / "config.json").read_text())
    n_tokens = sum(len(line["tokens"]) for line in lines(out).values())
    assert config["training"]["tokens"] == n_tokens


def test_an_endpoint_answers(
    foreign_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "p.json", tmp_path / "out.jsonl"
    kinds = ["good 0", "fails 1", "refused 2", "flaky 3", "nonsense 4", "good 5"]
    prompts.write_text(
        json.dumps([*({"prompt": kind} for kind in kinds), {"turns": ["good 6", "good 7"]}])
    )
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def impatient(options: DistillOptions) -> Endpoint:
        return Endpoint(
            url=options.url, model=options.model, key=os.environ[options.api_key_env],
            timeout_s=options.timeout, pause_s=0.01,
        )  # fmt: skip

    monkeypatch.setattr(DistillOptions, "endpoint", impatient)
    with serving() as server:
        more = (
            "--url",
            server.url,
            "--model",
            "t",
            "--api_key_env",
            "TEACHER_KEY",
            "--chat_template",
            "vicuna",
        )
        result = run(foreign_gguf, prompts, out, *more)
        assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
        found = lines(out)
        server.asked.clear()
        again = run(foreign_gguf, prompts, out, *more)
        assert {prompt.split()[0] for prompt in server.prompts()} == {
            "fails",
            "refused",
            "nonsense",
        }
    assert [key[: key.index("-")] for key in sorted(found)] == [f"p.json:{i}" for i in (1, 4, 6, 7)]
    for number, reason in (
        (2, "status 500 (5 attempts)"),
        (3, "status 401: bad key ***"),
        (5, "nonsense"),
    ):
        assert re.search(rf"p\.json:{number}-\w+: {re.escape(reason)}", result.stderr), (
            result.stderr
        )
    assert (
        "3 prompts without an answer" in result.output
        and "3 prompts without an answer" in again.output
    )
    assert KEY not in result.output + result.stderr + out.read_text()
    model = LlamaModel(foreign_gguf)
    line = next(line for key, line in found.items() if key.startswith("p.json:7-"))
    (a, b), (c, d) = line["answer_spans"]
    assert model.detokenize(line["tokens"][:a]) == "USER: good 6 ASSISTANT:"
    assert (
        model.detokenize(line["tokens"][a:b]) == " answer to good 6"
        and line["tokens"][b - 1] in model.eog
    )
    assert model.detokenize(line["tokens"][c:d]) == " answer to good 7"
    model.close()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--base_model_path", "absent.gguf"], "absent.gguf"),
        (["--prompts", "absent.jsonl"], "absent.jsonl"),
        (["--prompts", "useless.jsonl"], "not one prompt in it: useless.jsonl:1: no prompt in it"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:1: not JSON"),
        (["--temperature", "warm"], "numbers with commas"),
        (["--temperature", "0,-1"], "temperature -1.0"),
        (["--top_p", "2"], "top_p 2.0"),
        (["--prompt_tokens", "9-3"], "9-3"),
        (["--max_length", "4096"], "--max_length 4096: the model's context holds 512"),
        (["--max_length", "30"], "--max_length 30: too short"),
        (["--url", "example.com", "--model", "m"], "--url example.com"),
        (["--url", "http://example.com"], "--model"),
        (
            ["--url", "http://example.com", "--model", "m", "--api_key_env", "NO_SUCH_KEY"],
            "NO_SUCH_KEY",
        ),
        (["--output", "FILE/out.jsonl"], "is a file"),
        (["--output", "."], "is a folder"),
        (["--parallel", "257"], "parallel"),
        (["--loops", "maybe"], "loops"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    foreign_gguf: Path, prompts: Path, tmp_path: Path, more: list[str], says: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "useless.jsonl").write_text('{"foo": 1}')
    (tmp_path / "bad.jsonl").write_text("{not json")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        sys, "argv", ["distill.py", *command(foreign_gguf, prompts, tmp_path / "out.jsonl", *more)]
    )
    with pytest.raises(SystemExit) as stop:
        distill.run()
    assert stop.value.code == 2
    *_, errors = capsys.readouterr().err.strip().splitlines()
    assert says in errors and errors.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_prompt_that_is_too_long_is_named_and_the_rest_goes_on(
    foreign_gguf: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "p.json", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps([{"prompt": "x = 1\n" * 100}, {"prompt": "x = "}]))
    result = run(foreign_gguf, prompts, out, "--max_length", "64")
    assert re.search(
        r"p\.json:1-\w+: a prompt of \d+ tokens leaves no room for an answer within 64",
        result.stderr,
    )
    assert len(lines(out)) == 1


def test_every_token_is_counted_once(foreign_gguf: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    told = re.search(r"now (\d+) tokens", run(foreign_gguf, prompts, out, "--loops", "keep").output)
    spans = [span for line in lines(out).values() for span in line["answer_spans"]]
    assert told and int(told[1]) == sum(end - start for start, end in spans)

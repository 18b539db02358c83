"""The states cache: equal to what the model says, whole after kills, one writer, no NaN."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.errors import ContextError, DataError, OutputError
from model.training.data.samples import Sample
from model.training.ranks import Ranks
from model.training.states import streamed_states
from model.training.states.cached_states import CachedStates, cached_states
from model.training.states.extraction import decode_states, open_base, pack
from model.training.states.manifest import CacheKey
from model.training.states.shards import to_float8
from model.training.states.streamed_states import StreamedStates

KEY = CacheKey(
    base_fingerprint="base", tokenizer="tokenizer", data_sha256="data", max_length=64, dtype="fp16"
)
LENGTHS = [5, 64, 1, 37, 64, 3, 3, 20, 64, 11]


def make(lengths: list[int], vocab: int = 1000) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(f"text{i}", i, rng.integers(3, vocab, n).astype(np.int32), np.ones(n, bool))
        for i, n in enumerate(lengths)
    ]


class FakeBase:
    """States are a function of token and position; the cache is checked as llama.cpp would."""

    n_batch, n_seq_max, dim = 32, 4, 6

    def __init__(self, poison: dict[int, float] | None = None) -> None:
        self.poison = poison or {}
        self.lengths: dict[int, int] = {}
        self.decoded = 0

    def decode(
        self, tokens: np.ndarray, pos: np.ndarray, seq: np.ndarray, *, outputs: bool | None = None
    ) -> None:
        for p, s in zip(pos.tolist(), seq.tolist(), strict=True):
            assert self.lengths.get(s, 0) == p, (
                "a position is missing in the cache, or another sample's is there"
            )
            self.lengths[s] = p + 1
        self.rows = np.outer(tokens + 0.001 * pos, np.arange(self.dim)).astype(np.float32)
        for token, value in self.poison.items():
            self.rows[tokens == token, 2] = value
        self.decoded += len(tokens)

    def hidden(self, n: int) -> np.ndarray:
        return self.rows[:n]

    def seq_rm(self, seq: int, start: int, end: int) -> None:
        del self.lengths[seq]

    def clear(self) -> None:
        self.lengths = {}

    def __enter__(self) -> FakeBase:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def model(foreign_gguf: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(foreign_gguf)
    yield model
    model.close()


def test_batches_are_full_and_lose_nothing() -> None:
    rows = [s.tokens for s in make(LENGTHS)]
    batches = list(pack(rows, 32, 4))
    assert np.array_equal(np.concatenate([b.tokens for b in batches]), np.concatenate(rows))
    assert all(len(b.tokens) <= 32 and len(set(b.seq.tolist())) <= 4 for b in batches)
    assert sum(len(b.tokens) == 32 for b in batches) == len(batches) - 1
    assert sum(len(b.finished) for b in batches) == len(rows)


def test_an_abandoned_extraction_leaves_no_trace() -> None:
    base, samples = FakeBase(), make(LENGTHS)
    next(decode_states(base, samples))
    assert base.lengths, "the first batch must end within a sample"
    found = np.concatenate([block.copy() for block in decode_states(base, samples)])
    wanted = np.concatenate([block.copy() for block in decode_states(FakeBase(), samples)])
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_cached_states_are_the_models_own(model: LlamaModel, tmp_path: Path, dtype: str) -> None:
    """Packed with others, each text's states are those of decoding it alone."""
    samples = make(LENGTHS)
    key = replace(KEY, dtype=dtype)
    kept = cached_states(
        lambda: open_base(model, 64, 1),
        model.n_embd,
        samples,
        tmp_path / "c",
        key,
        shard_bytes=40_000,
    )
    order = [3, 0, 8, 2, 9, 1, 4, 5, 6, 7]
    bound = {"fp16": 2e-3, "fp8": 0.07}[dtype]
    with LlamaBase(model, n_ctx=128, n_threads=1, embeddings=True) as alone:
        for i, found in zip(order, kept.read(order), strict=True):
            alone.clear()
            alone.decode(samples[i].tokens, 0, 0, outputs=True)
            wanted = torch.from_numpy(alone.hidden(LENGTHS[i]).copy())
            assert found is not None and found.shape == wanted.shape
            assert (found.float() - wanted).norm() / wanted.norm() < bound
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert [n for shard in manifest["shards"] for n in shard["lengths"]] == LENGTHS


def test_streamed_states_equal_cached_ones_and_start_anywhere(model: LlamaModel) -> None:
    samples = make(LENGTHS * 3)
    order = np.random.default_rng(1).permutation(len(samples)).tolist()
    with open_base(model, 64, 1) as base, closing(StreamedStates(base, samples)) as streamed:
        whole = [s for s in streamed.read(order) if s is not None]
        late = [s for s in streamed.read(order, since=11) if s is not None]
    assert [len(s) for s in whole] == [len(samples[i].tokens) for i in order]
    assert all(torch.equal(a, b) for a, b in zip(whole[11:], late, strict=True))
    assert streamed_states.GROUP < 11, "the border between groups must not be where the test starts"


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_fp8_error_is_bounded(scale: float) -> None:
    rows = (np.random.default_rng(0).standard_normal((200, 64)) * scale).astype(np.float32)
    rows[7] = 0
    values, scales = to_float8(rows, np.abs(rows).max(axis=1))
    back = values.float() * scales[:, None]
    wanted = torch.from_numpy(rows)
    assert bool(torch.isfinite(back).all())
    assert torch.equal(back[7], wanted[7])
    assert bool(
        (
            (back - wanted).abs()
            <= torch.maximum(wanted.abs() / 16, scales[:, None] * 2**-10) * 1.0001
        ).all()
    )
    assert bool(((back - wanted).abs().amax(1)[:7] > 0).all())


class Pair(Ranks):
    """Two processes of one run, played by threads."""

    meeting, given = threading.Barrier(2, timeout=30), ["", ""]

    def gather(self, value: Any) -> list[Any]:
        self.given[self.rank] = json.dumps(value)
        self.meeting.wait()
        values = [json.loads(text) for text in self.given]
        self.meeting.wait()
        return values


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    samples, bases = make(LENGTHS * 4), (FakeBase(), FakeBase())

    def extract(folder: Path, rank: int, ranks: Ranks) -> CachedStates:
        return cached_states(
            lambda: bases[rank], FakeBase.dim, samples, folder, KEY, shard_bytes=2000, ranks=ranks
        )

    alone = extract(tmp_path / "alone", 0, Ranks())
    decoded = bases[0].decoded
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(lambda rank: extract(tmp_path / "both", rank, Pair(rank, 2)), range(2))
        )
    assert bases[0].decoded + bases[1].decoded == 2 * decoded, "nothing was decoded twice"
    assert 0.3 < bases[1].decoded / decoded < 0.7
    order = range(len(samples))
    for wanted, *found in zip(alone.read(order), *(kept.read(order) for kept in both), strict=True):
        assert wanted is not None and all(
            states is not None and torch.equal(states, wanted) for states in found
        )
    manifests = [
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("alone", "both")
    ]
    assert manifests[0] == manifests[1]


def test_a_cache_that_others_do_not_see_is_refused(tmp_path: Path) -> None:
    samples = make(LENGTHS * 4)

    def extract(rank: int) -> CachedStates:
        return cached_states(
            FakeBase,
            FakeBase.dim,
            samples,
            tmp_path / str(rank),
            KEY,
            shard_bytes=2000,
            ranks=Pair(rank, 2),
        )

    (tmp_path / "1").mkdir()  # a folder of the same name on another machine
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(extract, rank) for rank in range(2)]:
            with pytest.raises(DataError, match="all machines must see the same --cache_dir"):
                future.result()


def test_killed_while_extracting(foreign_gguf: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: finished shards are kept, all bytes equal an uninterrupted run's."""
    code = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = {[str(Path(__file__).parents[n]) for n in (0, 1, 2)]!r}
        from test_states import KEY, make, LENGTHS
        from model.base.llama_model import LlamaModel
        from model.training.states import cached_states as states
        from model.training.states.extraction import open_base, decode_states
        def slowly(base, samples):
            for block in decode_states(base, samples):
                time.sleep(0.4)
                yield block
        states.decode_states = slowly
        model = LlamaModel({str(foreign_gguf)!r})
        from pathlib import Path
        base = lambda: open_base(model, 64, 1)
        samples, folder = make(LENGTHS * 20), Path(sys.argv[1])
        states.cached_states(base, model.n_embd, samples, folder, KEY, shard_bytes=60_000)
        """
    )
    model = LlamaModel(foreign_gguf)
    samples = make(LENGTHS * 20)

    def extract(folder: Path) -> None:
        cached_states(
            lambda: open_base(model, 64, 1), model.n_embd, samples, folder, KEY, shard_bytes=60_000
        )

    folder = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.safetensors"))) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)

    with pytest.raises(DataError, match=f"process {child.pid} is writing"):  # the second writer
        extract(folder)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (folder / f".manifest.json.{child.pid}").write_bytes(
        b"{"
    )  # as a kill in the middle of writing leaves it
    finished = json.loads((folder / "manifest.json").read_text())["shards"]
    before = {s["file"]: (folder / s["file"]).stat().st_mtime_ns for s in finished}
    extract(folder)
    extract(tmp_path / "whole")
    model.close()
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) > len(before) + 2
    assert sorted(path.name for path in folder.iterdir()) == files
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert all((folder / name).stat().st_mtime_ns == at for name, at in before.items()), (
        "a finished shard was redone"
    )


def test_a_damaged_shard_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = make(LENGTHS)
    first = FakeBase()
    cached_states(lambda: first, 6, samples, tmp_path, KEY, shard_bytes=1000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    good = shards[1].read_bytes()
    shards[1].write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    second = FakeBase()
    cached_states(lambda: second, 6, samples, tmp_path, KEY, shard_bytes=1000)
    assert shards[1].read_bytes() == good
    assert 0 < second.decoded < first.decoded
    assert "damaged" in capsys.readouterr().err


def test_other_data_in_the_folder_is_refused(tmp_path: Path) -> None:
    cached_states(FakeBase, 6, make(LENGTHS), tmp_path, KEY)
    with pytest.raises(DataError, match="another data_sha256"):
        cached_states(FakeBase, 6, make(LENGTHS), tmp_path, replace(KEY, data_sha256="other"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_bad_states_name_the_sample_and_are_left_out(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = make(LENGTHS)
    samples[3].tokens[10] = 7777
    kept = cached_states(
        lambda: FakeBase({7777: value}), 6, samples, tmp_path, KEY, shard_bytes=1000
    )
    assert "text3" in capsys.readouterr().err
    again = cached_states(
        FakeBase, 6, samples, tmp_path, KEY, shard_bytes=1000
    )  # remembered, not decoded again
    for source in (kept, again):
        found = list(source.read(range(len(samples))))
        assert [i for i, s in enumerate(found) if s is None] == [3]
        assert all(bool(torch.isfinite(s).all()) for s in found if s is not None)


def test_bad_states_are_left_out_of_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    samples = make(LENGTHS)
    samples[3].tokens[10] = 7777
    found = list(StreamedStates(FakeBase({7777: float("nan")}), samples).read(range(len(samples))))
    assert [i for i, s in enumerate(found) if s is None] == [3]
    assert "text3" in capsys.readouterr().err


def threads() -> set[threading.Thread]:
    return {
        thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")
    }


def test_a_stream_runs_ahead_of_its_reader_by_a_few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, base, before = make([5] * 100), FakeBase(), threads()
    with closing(StreamedStates(base, samples)) as streamed:
        reader = streamed.read(range(100))
        next(reader)
        most = (streamed_states.AHEAD + 1) * streamed_states.GROUP * 5
        assert streamed_states.AHEAD >= 1
        deadline = time.monotonic() + 30
        while base.decoded < most and time.monotonic() < deadline:  # without being asked for more
            time.sleep(0.001)
        time.sleep(0.05)
        assert base.decoded == most
        assert len(list(reader)) == 99
        assert len(threads() - before) == 1
    assert not threads() - before


def test_a_stream_that_is_given_up_stops_within_a_batch() -> None:
    """As after Ctrl-C or an error of the trainer's, whose traceback may keep the reader alive."""
    samples, before = make([64] * 60), threads()
    go = threading.Event()

    class Slow(FakeBase):
        def decode(self, *arguments: Any, **more: Any) -> None:
            assert go.wait(30)
            super().decode(*arguments, **more)

    base = Slow()
    with closing(StreamedStates(base, samples)) as streamed:
        reader = streamed.read(range(60))
        go.set()
        next(reader)
        go.clear()
        seen = base.decoded
        threading.Timer(0.1, go.set).start()
    assert base.decoded <= seen + 2 * base.n_batch  # of 512 tokens that a group has
    assert not threads() - before
    del reader


def test_an_error_while_streaming_reaches_the_reader() -> None:
    class Full(FakeBase):
        def decode(self, *arguments: Any, **more: Any) -> None:
            if self.decoded > 500:
                raise ContextError("no room")
            super().decode(*arguments, **more)

    before = threads()
    with (
        closing(StreamedStates(Full(), make([5] * 300))) as streamed,
        pytest.raises(ContextError, match="no room"),
    ):
        list(streamed.read(range(300)))
    assert not threads() - before


def test_nothing_but_bad_states(tmp_path: Path) -> None:
    samples = make([4, 5])
    for sample in samples:
        sample.tokens[0] = 7777
    with pytest.raises(DataError, match="all samples"):
        cached_states(lambda: FakeBase({7777: float("nan")}), 6, samples, tmp_path, KEY)


def test_too_little_room_is_seen_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="--cache_dtype fp8"):
        cached_states(FakeBase, 6, make(LENGTHS), tmp_path / "c", KEY)
    assert not (tmp_path / "c").exists()
    assert "states need" in capsys.readouterr().out


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        cached_states(FakeBase, 6, make(LENGTHS), tmp_path / "file" / "c", KEY)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock.pid").write_text("999999")
    (tmp_path / ".states-00000.safetensors.999999").write_text("half a sh")
    assert isinstance(cached_states(FakeBase, 6, make(LENGTHS), tmp_path, KEY), CachedStates)
    assert not (tmp_path / "lock.pid").exists()
    assert not list(tmp_path.glob(".states-*"))


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        cached_states(FakeBase, 6, make(LENGTHS), tmp_path, KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]

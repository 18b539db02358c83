"""Requantizing and cutting: what is written is what was asked for, or nothing."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny_llama
import torch
from conftest import FOREIGN, ROOT, Foreign, random_llama

from model.base import cutting, gguf_file, quantizer
from model.base.cutting import cut_layers, layers_alike
from model.base.gguf_file import GGUFFile, requantize
from model.base.llama import Float32Array, LlamaBase
from model.base.llama_model import LlamaModel
from model.base.load_check import check_loads
from model.base.quantizer import TYPES, file_type, quality_warning, tensor_type
from model.errors import ModelFileError, OutputError, UsageError

TOKENS = np.arange(5, 45, dtype=np.int32)


def logits(path: Path) -> Float32Array:
    model = LlamaModel(path)
    with LlamaBase(model, n_ctx=64, n_threads=1) as base:
        base.decode(TOKENS, 0, 0, outputs=True)
        result = base.logits(len(TOKENS)).copy()
    model.close()
    return result


def no_child(*_: object, **__: object) -> None:
    raise AssertionError("a child process was started")


def full_disk(_: object) -> Any:
    return shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000)


def test_types_are_known_by_llama_cpps_names_in_any_case() -> None:
    assert [file_type(name) for name in ("q4_0", "Q4_K_M", "Bf16", "q5_k")] == [
        "Q4_0",
        "Q4_K_M",
        "BF16",
        "Q5_K_M",
    ]
    assert tensor_type("q6_k") == "Q6_K"
    for kind, tensor in TYPES.items():
        prefix = "ALL_" if kind == "F32" else "MOSTLY_"
        assert (
            getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}{kind}") == gguf.LlamaFileType[prefix + kind]
        )
        assert tensor in gguf.GGMLQuantizationType.__members__
    with pytest.raises(
        UsageError, match=r"quantization 'q9' is unknown; use one of f32, .*q4_0, .*q4_k_m"
    ):
        file_type("q9")
    with pytest.raises(UsageError, match=r"tensor type 'q4_k_m' is unknown; use one of .*q6_k, "):
        tensor_type("q4_k_m")


def test_a_quantized_file_becomes_one_of_another_type(bundled_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    requantize(bundled_gguf, target, "q8_0", "q5_1", threads=1)
    file = check_loads(target)
    assert file.file_type == "Q8_0"
    assert file.heads_fingerprint() == GGUFFile(bundled_gguf).heads_fingerprint()
    assert file.tensors["output.weight"].kind.name == "Q5_1"
    assert file.tensors["blk.3.ffn_up.weight"].kind.name == "Q8_0"
    apart = np.abs(
        file.tensor("blk.3.ffn_up.weight") - GGUFFile(bundled_gguf).tensor("blk.3.ffn_up.weight")
    )
    assert apart.max() < 0.01
    requantize(target, target.with_name("y.gguf"), "F16", threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf", "y.gguf"]


def test_what_is_lost_twice_is_said() -> None:
    assert "Q4_0 already" in quality_warning("Q4_0", "q4_k_m")
    assert "Q8_0 already" in quality_warning("Q8_0", "q4_0")
    for have, wanted in (("BF16", "q4_0"), ("F32", "q4_0"), ("Q4_0", "bf16"), ("Q4_0", "q4_0")):
        assert not quality_warning(have, wanted)


def test_llama_cpps_log_shows_on_demand_alone(
    foreign: Foreign,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level("DEBUG"):
        requantize(foreign.f32, tmp_path / "x.gguf", "q4_0")
    assert "blk.1.ffn_down.weight" in caplog.text
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    assert capfd.readouterr() == ("", "")


def test_an_lm_head_of_another_width_is_refused_as_llama_cpp_would_abort(
    bundled_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UsageError,
        match="'q4_k' cannot hold this LM head: rows of 320 weights are no multiple of 256",
    ):
        requantize(bundled_gguf, tmp_path / "x.gguf", "q4_0", "q4_k")
    monkeypatch.setattr(gguf_file, "block_size", lambda kind: 1)
    with pytest.raises(OutputError, match=r"could not write it as q4_0 \(it ended with SIGABRT"):
        requantize(bundled_gguf, tmp_path / "x.gguf", "q4_0", "q4_k")
    assert not list(tmp_path.iterdir())


def test_a_failing_quantizer_leaves_nothing_and_says_why(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(foreign.f32.read_bytes().replace(b"llama.block_count", b"llama.block_kount"))
    with pytest.raises(ModelFileError, match="block_count"):
        requantize(bad, tmp_path / "x.gguf", "q4_0")
    target = tmp_path / "out" / "x.gguf"

    def fail(*arguments: str, **_: object) -> subprocess.CompletedProcess[str]:
        Path(arguments[2]).write_bytes(b"half of it")
        return subprocess.CompletedProcess(
            [], 1, "", "llama_model_quantize: failed to quantize: no luck today\n"
        )

    monkeypatch.setattr(quantizer, "run_module", fail)
    with pytest.raises(
        OutputError, match=r"f32\.gguf: llama\.cpp could not write it as q4_0 \(no luck today\)"
    ):
        requantize(foreign.f32, target, "q4_0")
    assert not list(target.parent.iterdir())


def test_the_source_is_never_written_to(
    foreign: Foreign, split: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_child)
    source = tmp_path / "a.gguf"
    link = tmp_path / "link.gguf"
    source.write_bytes(foreign.f32.read_bytes())
    link.symlink_to(source)
    before = source.read_bytes(), split[1].read_bytes()
    writers: list[Callable[[Path, Path], None]] = [
        lambda a, b: requantize(a, b, "q8_0"),
        lambda a, b: cut_layers(a, b, 1),
    ]
    for write in writers:
        for a, b in ((source, source), (source, link), (link, source), (split[0], split[1])):
            with pytest.raises(UsageError, match="this is the file that is read"):
                write(a, b)
        with pytest.raises(OutputError, match="this is a folder"):
            write(source, tmp_path)
        with pytest.raises(OutputError, match="cannot be written"):
            write(source, source / "x.gguf")
    assert before == (source.read_bytes(), split[1].read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "link.gguf"]


def test_a_full_disk_is_seen_before_the_work(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_child)
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    with pytest.raises(
        OutputError, match=r"x\.gguf: 1\.0 MB are needed, 1\.0 KB are free; choose another folder"
    ):
        requantize(foreign.f32, tmp_path / "new" / "x.gguf", "q8_0")
    with pytest.raises(OutputError, match="make room"):
        cut_layers(foreign.f32, tmp_path / "new" / "x.gguf", 1)
    assert not list(tmp_path.iterdir())


def test_what_is_needed_is_what_is_written_at_the_least(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate lies below the file, and not far."""
    needs = list[int]()
    monkeypatch.setattr(gguf_file, "require_room", lambda path, n: needs.append(n))
    monkeypatch.setattr(cutting, "require_room", lambda path, n: needs.append(n))
    target = tmp_path / "x.gguf"
    requantize(foreign.f32, target, "q5_0", "q4_0")
    assert 0.9 * target.stat().st_size < needs[0] < target.stat().st_size
    cut_layers(foreign.f32, target, 1)
    assert needs[1] == target.stat().st_size


def running(target: Path) -> list[str]:
    """Return the command lines of processes with `target`'s draft among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if f".{target.name}." in line:
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_ctrl_c_ends_llama_cpps_work_at_once(bundled_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "interrupted-in-a-test.gguf"
    code = (
        "import sys; from pathlib import Path; from model.base.gguf_file import requantize\n"
        "requantize(Path(sys.argv[1]), Path(sys.argv[2]), 'iq4_nl', threads=1)"  # the slowest type
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, bundled_gguf, target], env=env, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (running(target) and any(path.stat().st_size for path in tmp_path.iterdir())):
        assert time.monotonic() < deadline and parent.poll() is None, (
            "it must be at work for a while"
        )
        time.sleep(0.01)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) != 0
    assert not running(target) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def split(foreign: Foreign, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The foreign model once more, in shards."""
    folder = tmp_path_factory.mktemp("split")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tiny_llama.gguf.GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=8)
        )
        tiny_llama.write_gguf(
            folder / "foreign.gguf", foreign.torch_model, foreign.tokenizer, "foreign"
        )
    return sorted(folder.glob("*.gguf"))


def test_all_layers_are_the_same_model(
    bundled_gguf: Path, foreign: Foreign, split: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "x.gguf"
    cut_layers(bundled_gguf, target, GGUFFile(bundled_gguf).n_layer)
    assert target.read_bytes() == bundled_gguf.read_bytes()
    np.testing.assert_array_equal(logits(target), logits(bundled_gguf))
    cut_layers(split[0], target, 2)  # becomes one file
    assert not [key for key in GGUFFile(target).metadata if key.startswith("split.")]
    np.testing.assert_array_equal(logits(target), logits(foreign.f32))


def test_the_first_layers_are_a_model(bundled_gguf: Path, tmp_path: Path) -> None:
    source = GGUFFile(bundled_gguf)
    target = tmp_path / "x.gguf"
    cut_layers(bundled_gguf, target, 2)
    file = check_loads(target)
    assert file.n_layer == 2 and file.heads_fingerprint() == source.heads_fingerprint()
    cut_off = tuple(f"blk.{n}." for n in range(2, 6))
    assert list(file.tensors) == [name for name in source.tensors if not name.startswith(cut_off)]
    for name in file.tensors:
        np.testing.assert_array_equal(file.raw(name), source.raw(name))
    different = {
        key
        for key in source.metadata
        if not np.array_equal(source.metadata[key], file.metadata[key])
    }
    assert different == {"llama.block_count"}
    requantize(target, tmp_path / "y.gguf", "bf16")
    assert check_loads(tmp_path / "y.gguf").n_layer == 2


def test_one_layer_computes_what_it_does_in_torch(foreign: Foreign, tmp_path: Path) -> None:
    cut_layers(foreign.f32, tmp_path / "x.gguf", 1)
    short = random_llama(replace(FOREIGN, layers=1))
    short.load_state_dict(foreign.torch_model.state_dict(), strict=False)
    with torch.no_grad():
        expected = short(torch.from_numpy(TOKENS).long()[None])[0].numpy()
    got = logits(tmp_path / "x.gguf")
    assert np.abs(got - expected).max() < 0.02
    assert np.abs(got - logits(foreign.f32)).max() > 1, "the other layer counts"


def test_values_per_layer_are_cut_too(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = gguf.GGUFWriter.add_head_count_kv

    def per_layer(w: gguf.GGUFWriter, n: int) -> None:
        one(w, [n] * 4)
        w.add_array("llama.rope.some_sections", [1, 2, 3, 4])  # as many, but not one per layer
        w.add_array("llama.attention.flags", [True, False, True, True])

    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count_kv", per_layer)
    source = tmp_path / "source.gguf"
    target = tmp_path / "x.gguf"
    tiny_llama.write_gguf(
        source, random_llama(replace(FOREIGN, layers=4)), foreign.tokenizer, "arrays"
    )
    cut_layers(source, target, 3)
    values = check_loads(target).metadata
    assert values["llama.attention.head_count_kv"].tolist() == [FOREIGN.n_kv_heads] * 3
    assert values["llama.attention.flags"].tolist() == [True, False, True]
    assert values["llama.rope.some_sections"].tolist() == [1, 2, 3, 4]
    kinds = [
        gguf.GGUFReader(path).fields["llama.attention.head_count_kv"].types
        for path in (source, target)
    ]
    assert kinds[0] == kinds[1]


def test_a_large_model_is_cut_in_blocks(
    bundled_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "_CHUNK", 100_000)
    tracemalloc.start()
    try:
        cut_layers(bundled_gguf, tmp_path / "x.gguf", 6)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bundled_gguf.stat().st_size / 3  # the header's 4,096 tokens take most of it
    assert (tmp_path / "x.gguf").read_bytes() == bundled_gguf.read_bytes()


def test_what_cannot_be_cut(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layers in (0, -1, 3):
        with pytest.raises(UsageError, match=rf"^{layers} layers asked for; .* has 1 to 2 to give"):
            cut_layers(foreign.f32, tmp_path / "x.gguf", layers)
    raw = foreign.f32.read_bytes()
    strange = tmp_path / "strange.gguf"
    for old, new in (
        ("blk.1.attn_q.weight", "enc.1.attn_q.weight"),
        ("output_norm.weight", "output_what.weight"),
    ):
        strange.write_bytes(raw.replace(old.encode(), new.encode()))
        with pytest.raises(
            ModelFileError, match=f"llama model cannot be cut off, as it has the tensor {new}"
        ):
            cut_layers(strange, tmp_path / "x.gguf", 1)
    monkeypatch.setattr(
        GGUFFile, "raw", lambda *_: (_ for _ in ()).throw(OSError(5, "input/output error"))
    )
    with pytest.raises(OutputError, match=r"x\.gguf: cannot be written \(input/output error\)"):
        cut_layers(foreign.f32, tmp_path / "x.gguf", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["strange.gguf"]


def test_layers_that_predict_further_tokens_are_not_cut(foreign: Foreign, tmp_path: Path) -> None:
    file = GGUFFile(foreign.f32)
    file.metadata["llama.nextn_predict_layers"] = 1
    with pytest.raises(ModelFileError, match="layers that predict further tokens"):
        cutting._layer(file, "blk.0.attn_q.weight")


def test_layers_that_differ_are_found(foreign: Foreign) -> None:
    assert layers_alike(GGUFFile(foreign.f32)) and layers_alike(GGUFFile(foreign.q8_0))
    file = GGUFFile(foreign.f32)
    tensor = file.tensors["blk.1.ffn_up.weight"]
    file.tensors[tensor.name] = replace(tensor, shape=(640, 192))
    assert not layers_alike(file)
    del file.tensors[tensor.name]
    assert not layers_alike(file)

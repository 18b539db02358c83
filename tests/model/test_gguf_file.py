"""GGUFFile: facts, tensors, fingerprints, split files, requantizing, damage."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_llama
from conftest import FOREIGN, Foreign, random_llama

from model.base.gguf_file import GGUFFile, requantize
from model.base.load_check import check_loads
from model.errors import ModelFileError, OutputError, UsageError
from model.storage import facts


def bare(path: Path, architecture: str = "llama", **floats: float) -> GGUFFile:
    """Open a file of metadata only."""
    w = gguf.GGUFWriter(str(path), architecture)
    w.add_context_length(64)
    w.add_embedding_length(8)
    w.add_block_count(1)
    w.add_token_list([b"a", b"b\xff"])
    for key, value in floats.items():
        w.add_float32(f"{architecture}.{key}", value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    return GGUFFile(path)


def test_facts(foreign: Foreign) -> None:
    for path, kind in ((foreign.f32, "F32"), (foreign.q8_0, "Q8_0")):
        file = GGUFFile(path)
        assert (file.architecture, file.name, file.file_type) == ("llama", "foreign", kind)
        assert (file.n_vocab, file.n_embd, file.n_layer, file.context_length) == (1024, 192, 2, 512)
        assert (file.logit_scale, file.soft_cap, file.tied, file.paths) == (1.0, 0.0, False, [path])


def test_reads_what_the_gguf_package_reads(foreign: Foreign, bundled_gguf: Path) -> None:
    for path in (foreign.f32, foreign.q8_0, bundled_gguf):
        file = GGUFFile(path)
        reader = gguf.GGUFReader(path)
        fields = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        assert file.metadata.keys() == fields.keys()
        for key, value in fields.items():
            assert (
                list(file.metadata[key]) == value
                if isinstance(value, list)
                else file.metadata[key] == value
            ), key
        for tensor in reader.tensors:
            np.testing.assert_array_equal(
                file.tensor(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            )


def test_lm_head_and_embeddings(foreign: Foreign) -> None:
    head, embeddings = (
        p.detach().numpy()
        for p in (foreign.torch_model.output.weight, foreign.torch_model.token_embd.weight)
    )
    np.testing.assert_array_equal(GGUFFile(foreign.f32).output_weight(), head)
    np.testing.assert_array_equal(GGUFFile(foreign.f32).token_embeddings(), embeddings)
    rounded = GGUFFile(foreign.q8_0).output_weight()
    # Q8_0: steps of max/127 per block.
    assert 0 < np.abs(rounded - head).max() <= np.abs(head).max() / 127
    assert rounded.dtype == np.float32
    assert rounded.shape == (1024, 192)


def test_tied_model_gives_its_embeddings(foreign: Foreign, tmp_path: Path) -> None:
    model = random_llama(replace(FOREIGN, tied=True))
    tiny_llama.write_gguf(tmp_path / "tied.gguf", model, foreign.tokenizer, "tied")
    file = GGUFFile(tmp_path / "tied.gguf")
    assert file.tied
    np.testing.assert_array_equal(file.output_weight(), model.token_embd.weight.detach().numpy())
    with pytest.raises(ModelFileError, match=r"no tensor is named output\.weight"):
        file.tensor("output.weight")


def test_logit_scale_and_soft_cap(tmp_path: Path) -> None:
    assert bare(tmp_path / "a.gguf", "command-r", logit_scale=0.25).logit_scale == 0.25
    # For these families llama.cpp divides.
    assert bare(tmp_path / "b.gguf", "granite", logit_scale=4.0).logit_scale == 0.25
    assert bare(tmp_path / "c.gguf", "gemma2", final_logit_softcapping=30.0).soft_cap == 30.0
    assert bare(tmp_path / "d.gguf").metadata["tokenizer.ggml.tokens"] == ["a", "b\udcff"]


def test_fingerprints(foreign: Foreign, tmp_path: Path) -> None:
    f32 = GGUFFile(foreign.f32)
    q8_0 = GGUFFile(foreign.q8_0)
    assert f32.file_fingerprint() == hashlib.sha256(foreign.f32.read_bytes()).hexdigest()
    assert f32.file_fingerprint() != q8_0.file_fingerprint()
    assert f32.heads_fingerprint() == q8_0.heads_fingerprint()

    narrow = random_llama(replace(FOREIGN, dim=96, n_heads=3, n_kv_heads=1))
    tiny_llama.write_gguf(tmp_path / "narrow.gguf", narrow, foreign.tokenizer, "foreign")
    assert GGUFFile(tmp_path / "narrow.gguf").heads_fingerprint() != f32.heads_fingerprint()
    raw = foreign.f32.read_bytes()
    assert raw.count(b"<0x0A>") == 1
    (tmp_path / "other.gguf").write_bytes(raw.replace(b"<0x0A>", b"<0x0_>"))
    assert GGUFFile(tmp_path / "other.gguf").heads_fingerprint() != f32.heads_fingerprint()
    (tmp_path / "named.gguf").write_bytes(raw.replace(b"foreign", b"renamed"))
    assert GGUFFile(tmp_path / "named.gguf").heads_fingerprint() == f32.heads_fingerprint()


def test_token_boundaries_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    one = bare(tmp_path / "a.gguf")
    two = bare(tmp_path / "b.gguf")
    two.metadata["tokenizer.ggml.tokens"] = ["ab", "\udcff"]
    assert one.heads_fingerprint() != two.heads_fingerprint()


def test_files_are_hashed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    file = bare(path)
    before = file.file_fingerprint()
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"llama", b"LLAMA"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.file_fingerprint() == before  # same path, size and time: remembered
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file.file_fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest() != before


def test_an_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(facts, "folder", lambda: tmp_path / "file" / "x")
    path = tmp_path / "a.gguf"
    assert bare(path).file_fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()


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


def test_split_files(foreign: Foreign, split: list[Path]) -> None:
    whole = GGUFFile(foreign.f32)
    parts = GGUFFile(split[0])
    assert parts.paths == split
    assert len(split) == 3
    for name in ("token_embd.weight", "blk.1.ffn_down.weight", "output.weight"):
        np.testing.assert_array_equal(parts.tensor(name), whole.tensor(name))
    assert parts.heads_fingerprint() == whole.heads_fingerprint()
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in split]
    assert parts.file_fingerprint() == hashlib.sha256("".join(digests).encode()).hexdigest()


def test_split_files_are_named_by_the_first_and_complete(split: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileError,
        match=r"part 2 of a split model; name the first, foreign-00001-of-00003\.gguf",
    ):
        GGUFFile(split[1])
    for path in split[:2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelFileError, match=r"foreign-00003-of-00003\.gguf: this part"):
        GGUFFile(tmp_path / split[0].name)


def test_split_files_behind_links_load(
    split: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Hugging Face's cache keeps them: the other parts are found by the name of the link."""
    monkeypatch.setattr(facts, "folder", lambda: tmp_path / "cache")
    for i, path in enumerate(split):
        (tmp_path / f"blob{i}").write_bytes(path.read_bytes())
        (tmp_path / path.name).symlink_to(tmp_path / f"blob{i}")
    assert check_loads(tmp_path / split[0].name).n_vocab == 1024


def test_requantize(foreign: Foreign, tmp_path: Path) -> None:
    target = tmp_path / "new" / "foreign-q4.gguf"
    requantize(foreign.f32, target, "Q4_0", "Q8_0")
    file = GGUFFile(target)
    assert file.file_type == "Q4_0"
    np.testing.assert_array_equal(file.output_weight(), GGUFFile(foreign.q8_0).output_weight())
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_requantize_refuses_in_one_line(foreign: Foreign, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantization 'Q99' is unknown"):
        requantize(foreign.f32, tmp_path / "x.gguf", "Q99")
    with pytest.raises(UsageError, match="tensor type 'Q99' is unknown"):
        requantize(foreign.f32, tmp_path / "x.gguf", "Q4_0", "Q99")
    with pytest.raises(ModelFileError, match="no such file"):
        requantize(tmp_path / "none.gguf", tmp_path / "x.gguf", "Q4_0")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        requantize(foreign.f32, tmp_path / "file" / "x.gguf", "Q4_0")


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as error:
        GGUFFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.gguf")
    assert "this is a folder" in refusal(tmp_path)
    (tmp_path / "empty.gguf").touch()
    assert "not a GGUF" in refusal(tmp_path / "empty.gguf")
    (tmp_path / "page.gguf").write_bytes(b"<!doctype html>" * 100)
    assert "not a GGUF" in refusal(tmp_path / "page.gguf")


def test_files_cut_off_anywhere(foreign: Foreign, tmp_path: Path) -> None:
    raw = foreign.q8_0.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (24, 25, 60, 100, 1_000, 10_000, 30_000, 40_000, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        assert "damaged or cut off" in refusal(path)


def test_damaged_headers_give_one_line_or_open(foreign: Foreign, tmp_path: Path) -> None:
    """400 files with 1 to 8 wrong bytes in the header's interesting parts.

    Nothing but ModelFileError may come out.
    """
    raw = foreign.q8_0.read_bytes()
    path = tmp_path / "damaged.gguf"
    first = raw.index(b"tokenizer.ggml.tokens") + 100
    last = raw.index(b"tokenizer.ggml.token_type") - 40
    infos = raw.index(b"blk.0.attn_k.weight") - 60
    spans = [*range(4, first), *range(last, last + 100), *range(infos, infos + 1200)]
    rng = np.random.default_rng(0)
    lines = list[str]()
    for _ in range(400):
        data = bytearray(raw)
        for at in rng.choice(spans, rng.integers(1, 9)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            GGUFFile(path)
        except ModelFileError as error:
            lines.append(str(error))
    assert len(lines) > 200
    assert not [line for line in lines if "\n" in line]

"""Heads on disk: round trips, refusals in one line, and nothing half-written."""

import json
import logging
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import HeadsError, OutputError
from model.heads.files import (
    CONFIG_FILE,
    HEADS_FILE,
    Rows,
    base_facts,
    heads_folder,
    load_heads,
    new_heads,
    save_heads,
    write_heads,
)
from model.heads.hydra import HydraHeads
from model.heads.medusa import HeadsConfig, MedusaHeads

K, D, V = 3, 16, 40


class FakeBase:
    """What `load_heads` needs of a GGUF."""

    def __init__(
        self, n_embd: int = D, n_vocab: int = V, tokenizer: str = "t", file: str = "f"
    ) -> None:
        self.n_embd = n_embd
        self.n_vocab = n_vocab
        self.name = "fake"
        self.file_type = "Q4_0"
        self.logit_scale = 0.5
        self.soft_cap = 30.0
        self._tokenizer = tokenizer
        self._file = file

    def heads_fingerprint(self) -> str:
        return self._tokenizer

    def file_fingerprint(self) -> str:
        return self._file

    tied = False

    def output_weight(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        rng = np.random.default_rng(0)
        return rng.standard_normal((self.n_vocab, self.n_embd), np.float32)[rows]

    def token_embeddings(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        rng = np.random.default_rng(1)
        return rng.standard_normal((self.n_vocab, self.n_embd), np.float32)[rows]


def make(lm_head: str = "tied", hidden: int = 0, head_type: str = "medusa") -> MedusaHeads:
    torch.manual_seed(0)
    config = HeadsConfig(
        k_heads=K,
        dim=D,
        vocab=V,
        head_layers=2,
        hidden_dim=hidden,
        lm_head=lm_head,  # type: ignore[arg-type]
        head_type=head_type,  # type: ignore[arg-type]
    )
    heads = new_heads(config, FakeBase())
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter))
    return heads


def facts(counts: bool = True) -> dict[str, Any]:
    extra = {"token_counts": np.arange(V, dtype=np.int64) + 2**31} if counts else {}
    return {
        **base_facts(FakeBase()),
        "training": {"epochs": 3},
        "rank_accuracies": [[0.5] * 10] * K,
        **extra,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_heads(tmp_path / "heads", make(), facts())
    return tmp_path / "heads"


@pytest.mark.parametrize("lm_head", ["tied", "own"])
@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("head_type", ["medusa", "hydra"])
def test_round_trip(tmp_path: Path, lm_head: str, hidden: int, head_type: str) -> None:
    heads = make(lm_head, hidden, head_type)
    states = torch.randn(4, D)
    tokens = torch.randint(V, (4, K))
    save_heads(tmp_path / "heads", heads, facts())
    for path in (tmp_path / "heads", tmp_path / "heads" / HEADS_FILE):
        loaded, config = load_heads(path, FakeBase())
        assert loaded.config == heads.config
        assert type(loaded) is type(heads)
        assert torch.equal(loaded.logits(states, tokens), heads.logits(states, tokens))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert config["training"] == {"epochs": 3}
        assert config["rank_accuracies"] == [[0.5] * 10] * K
        assert config["token_counts"].dtype == np.int32
        assert (config["token_counts"] == 2**31 - 1).all()  # larger counts end there
        wanted = np.arange(V)[::-1] + 2**31
        assert config["token_frequencies"] == {
            "top": [[n - 2**31, n] for n in wanted.tolist()], "total": int(wanted.sum()),
        }  # fmt: skip
    names = set(load_file(tmp_path / "heads" / HEADS_FILE))
    assert ("lm_head" in names) == (lm_head == "own")


def test_the_most_frequent_tokens_stand_in_the_config(tmp_path: Path) -> None:
    counts = np.zeros(V, np.int64)
    counts[[7, 3, 9]] = 2, 5, 2
    save_heads(tmp_path / "heads", make(), {**facts(), "token_counts": counts})
    config = json.loads((tmp_path / "heads" / CONFIG_FILE).read_text())
    assert config["token_frequencies"] == {"top": [[3, 5], [7, 2], [9, 2]], "total": 9}
    assert load_heads(tmp_path / "heads", FakeBase())[1]["token_counts"].tolist() == counts.tolist()


def test_saving_again_replaces_and_leaves_nothing_beside(folder: Path) -> None:
    other = make("own")
    save_heads(folder, other, facts(counts=False))
    loaded, config = load_heads(folder, FakeBase())
    assert loaded.config == other.config
    assert config["token_counts"] is None
    assert [path.name for path in folder.parent.iterdir()] == ["heads"]


def test_another_quantization_is_fine_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load_heads(folder, FakeBase())
        assert not caplog.records
        load_heads(folder, FakeBase(file="g"))
    assert len(caplog.records) == 1
    assert "Q4_0" in caplog.text


def test_heads_without_a_type_are_medusas(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config.pop("head_type") == "medusa"
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert load_heads(folder, FakeBase())[0].config.head_type == "medusa"


def test_hydra_heads_of_a_tied_model_hold_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBase, "tied", True)
    heads = make(head_type="hydra")
    assert isinstance(heads, HydraHeads) and heads.embeddings.data_ptr() == heads.lm_head.data_ptr()


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (FakeBase(n_embd=32), "width 16"),
        (FakeBase(n_vocab=41), "40 tokens"),
        (FakeBase(tokenizer="u"), "tokenizers"),
    ],
)
def test_heads_of_another_model_are_refused(folder: Path, base: FakeBase, words: str) -> None:
    refuse(folder, words, base)


def refuse(path: Path, words: str, base: FakeBase | None = None) -> None:
    with pytest.raises(HeadsError, match=words) as caught:
        load_heads(path, base or FakeBase())
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_heads(folder: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no heads")
    (folder / HEADS_FILE).unlink()
    refuse(folder, "is missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=99), "format_version 99"),
        (lambda c: c.pop("format_version"), "format_version None"),
        (lambda c: c.update(k_heads=0), "k_heads is 0"),
        (lambda c: c.update(k_heads=True), "k_heads is True"),
        (lambda c: c.update(head_layers="2"), "head_layers is '2'"),
        (lambda c: c.update(hidden_dim=10**30), "hidden_dim is 1"),
        (lambda c: c.pop("dim"), "dim is None"),
        (lambda c: c.update(lm_head="both"), "lm_head is 'both'"),
        (lambda c: c.update(base_name=[1]), "base_name"),
        (lambda c: c.update(k_heads=2), "rank_accuracies"),
        (lambda c: c.update(k_heads=2, rank_accuracies=[[0.5]] * 2), "weight is|bias is"),
        (lambda c: c.update(rank_accuracies=[[0.5], [0.5], [0.5, 0.5]]), "rank_accuracies"),
        (lambda c: c.update(rank_accuracies=[[float("nan")]] * K), "rank_accuracies"),
        (lambda c: c.update(rank_accuracies="high"), "rank_accuracies"),
        (lambda c: c.update(hidden_dim=6), "up"),
        (lambda c: c.update(lm_head="own"), "lm_head"),
        (lambda c: c.update(head_type="eagle"), "head_type is 'eagle'"),
        (lambda c: c.update(head_type="hydra"), "embed"),
    ],
)
def test_a_config_that_makes_no_sense(
    folder: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    refuse(folder, words)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_config_that_is_no_config(folder: Path, text: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(text)
    refuse(folder, "train the heads anew")


def test_damaged_tensors(folder: Path) -> None:
    path = folder / HEADS_FILE
    whole = (folder / HEADS_FILE).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    damaged = [
        b"",
        whole[:5],
        whole[: 8 + header // 2],
        whole[:-7],
        whole + b"x",
        b"\xff" * len(whole),
    ]
    damaged.append(whole.replace(b"F32", b"F99"))
    damaged.append(whole[:8] + b"x" + whole[9:])
    for data in damaged:
        path.write_bytes(data)
        refuse(folder, "damaged")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("bias", None, "bias"),
        ("bias", torch.zeros(2, K, D + 1), "bias is"),
        ("bias", torch.full((2, K, D), torch.nan), "finite"),
        ("bias", torch.full((2, K, D), torch.inf), "finite"),
        ("bias", torch.zeros(2, K, D, dtype=torch.int32), "finite"),
        ("more", torch.zeros(1), "more"),
        ("token_counts", torch.zeros(V + 1, dtype=torch.int32), "token_counts"),
    ],
)
def test_wrong_tensors(folder: Path, name: str, tensor: torch.Tensor | None, words: str) -> None:
    tensors = load_file(folder / HEADS_FILE)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / HEADS_FILE)
    refuse(folder, words)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_former_heads(folder: Path) -> None:
    before, _ = load_heads(folder, FakeBase())
    with small_disk(1000), pytest.raises(OutputError, match="cannot write"):
        save_heads(folder, make("own"), facts())
    after, _ = load_heads(folder, FakeBase())
    assert after.config == before.config
    assert [path.name for path in folder.parent.iterdir()] == ["heads"]


def test_an_error_while_writing_keeps_the_former_heads(folder: Path) -> None:
    def write() -> None:
        with heads_folder(folder) as new:
            write_heads(new, make("own"), facts())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert load_heads(folder, FakeBase())[0].config == make().config
    assert [path.name for path in folder.parent.iterdir()] == ["heads"]


def test_death_between_the_two_renames_loses_nothing(folder: Path) -> None:
    folder.rename(folder.with_name(".heads.old"))
    assert load_heads(folder, FakeBase())[0].config == make().config
    save_heads(folder, make("own"), facts())
    assert [path.name for path in folder.parent.iterdir()] == ["heads"]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save_heads(tmp_path / "file" / "heads", make(), facts())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="other files"):
        save_heads(tmp_path / "mine", make(), facts())
    assert (tmp_path / "mine" / "thesis.txt").exists()

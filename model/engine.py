"""A GGUF and the heads that belong to it, put together: contexts, drafters and ready-to-run decoders.

The one place where heads meet decoding. Knows no command line and no environment; settings are passed in.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.base.gguf_file import GGUFFile
from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.base.lm_head import check_lm_head
from model.base.load_check import check_loads
from model.decoding.drafting import Drafter, Ranker
from model.decoding.generation import Generation, Request
from model.decoding.planning import ROOT_ONLY, FixedPlan, Plan
from model.errors import HeadsError, ModelFileError, UsageError
from model.trees.tree import Tree

if TYPE_CHECKING:
    from model.heads.medusa import MedusaHeads

log = logging.getLogger(__name__)
COVERED = 0.999  # of the training text: drafts are made of the tokens that make up so much of it


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded; the fields are the environment variables of the same names."""

    n_threads: int
    context_size: int  # 0: as trained, at most 4,096
    n_gpu_layers: int = 0
    use_mmap: bool = True
    use_mlock: bool = False
    flash_attn: bool | None = None
    kv_type: str = "f16"
    k_heads: int | None = None
    max_nodes: int = 64


@dataclass
class Decoder:
    """One way to decode: a context, a plan, a drafter or none, drafts from the text so far or none."""

    base: LlamaBase
    plan: Plan
    drafter: Drafter | None
    context: int
    ngrams: bool = False

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.base.close()

    def start(self, request: Request, *, keep_logits: bool = False) -> Generation:
        """Begin a text on an empty cache."""
        self.base.clear()
        model = self.base.model
        return Generation(
            self.base,
            model.piece,
            model.eog,
            request,
            context=self.context,
            plan=self.plan,
            drafter=self.drafter,
            ngrams=self.ngrams,
            keep_logits=keep_logits,
        )


class Engine:
    """A loaded base model with its draft heads, if it has any."""

    def __init__(self, path: Path, options: EngineOptions, weights: Path | None, heads_folder: Path) -> None:
        self.file = check_loads(path)
        self.options = options
        self.model = LlamaModel(
            path, n_gpu_layers=options.n_gpu_layers, use_mmap=options.use_mmap, use_mlock=options.use_mlock
        )
        self.context = options.context_size or min(self.model.n_ctx_train, 4096)
        self.weights = weights or find_heads(heads_folder, self.file)

    @cached_property
    def _loaded(self) -> tuple[MedusaHeads, dict[str, Any]]:
        from model.heads.files import load_heads  # torch: loaded only when heads are used

        if self.weights is None:
            raise HeadsError(
                f"no heads for {self.file.path} are known; train them: python model/train_medusa.py "
                f"--base_model_path {self.file.path}"
            )
        if not self.model.can_roll_back:
            raise ModelFileError(
                f"{self.file.path}: {self.file.architecture} models are recurrent and cannot roll back "
                "a draft; use --draft none"
            )
        loaded = load_heads(self.weights, self.file)
        check_lm_head(self.model, self.file, self.options.n_threads)
        return loaded

    @property
    def heads(self) -> MedusaHeads:
        """The draft heads. Raises HeadsError when there are none or they don't fit, ModelFileError for the model."""
        return self._loaded[0]

    @property
    def heads_facts(self) -> dict[str, Any]:
        """What `config.json` says of the heads."""
        return self._loaded[1]

    @property
    def n_heads(self) -> int:
        """How many heads may be used; 0 where MEDUSA_MAX_TOKENS_PER_STEP leaves room for the root alone."""
        return min(self.heads.config.k_heads, self.options.k_heads or 256, self.options.max_nodes - 1)

    @property
    def cell_bytes(self) -> int:
        """About how many bytes of KV cache a token takes: as if all attention heads were of one size."""
        facts, kind = self.file.metadata, self.file.architecture
        heads, shared = (facts.get(f"{kind}.attention.head_count{suffix}") for suffix in ("", "_kv"))
        share = shared / heads if isinstance(heads, int) and heads and isinstance(shared, int) else 1.0
        size = {"f32": 4.0, "q8_0": 1.07, "q4_0": 0.57}.get(self.options.kv_type, 2.0)
        return max(1, int(2 * size * self.file.n_layer * self.file.n_embd * share))

    def check_tree(self, tree: Tree) -> Tree:
        """Return the tree when these heads can draft it within the limits, else raise UsageError."""
        if tree.max_depth > self.n_heads:
            raise UsageError(f"the tree is {tree.max_depth} deep, but {self.n_heads} heads may be used")
        if len(tree) > self.options.max_nodes:
            raise UsageError(
                f"the tree has {len(tree)} nodes; MEDUSA_MAX_TOKENS_PER_STEP allows {self.options.max_nodes}"
            )
        if tree.n_ranks > self.file.n_vocab:
            raise UsageError(f"the tree uses rank {tree.n_ranks - 1}, the vocabulary has {self.file.n_vocab} tokens")
        return tree

    def drafter(
        self, tree: Tree, draft_vocab: int | None = None, *, ranks: int = 0, with_probs: bool = False
    ) -> Ranker:
        """Make the heads' drafter for a tree.

        draft_vocab: how many of the most frequent tokens it drafts from; 0: all; None: those that make up COVERED of
        the training text. ranks: guesses per head; 0: as many as the tree uses.
        """
        from model.heads.drafter import covering
        from model.heads.hydra_drafter import drafter_for

        self.check_tree(tree)
        counts = self.heads_facts["token_counts"]
        if draft_vocab is None:
            draft_vocab = covering(counts, COVERED) if counts is not None else 0
        return drafter_for(
            self.heads,
            n_heads=tree.max_depth,
            ranks=ranks or tree.n_ranks,
            draft_vocab=draft_vocab,
            token_counts=counts,
            n_threads=self.options.n_threads,
            with_probs=with_probs,
        )

    def base(
        self, plan: Plan | None = None, kind: type[LlamaBase] = LlamaBase, *, sequences: int = 0, context: int = 0
    ) -> LlamaBase:
        """Make a context: as plain decoding has it, or with lanes for all that a plan may draft.

        sequences: how many ids there are; 0: as many as the plan has lanes. context: tokens; 0: as the settings say.
        """
        o, nodes = self.options, plan.max_nodes if plan else 1
        return kind(
            self.model,
            n_ctx=(context or self.context) + (nodes if nodes > 1 else 0),
            n_threads=o.n_threads,
            n_seq_max=sequences or (plan.lanes if plan else 1),
            embeddings=nodes > 1,
            flash_attn=o.flash_attn,
            kv_type=o.kv_type,
        )

    def decoder(
        self,
        tree: Tree = ROOT_ONLY,
        drafter: Drafter | None = None,
        *,
        branch: int = 0,
        draft_vocab: int | None = None,
        context: int = 0,
    ) -> Decoder:
        """Make a decoder for a tree and a branch of up to so many tokens; without a `drafter` the heads draft."""
        if drafter is None and len(tree) > 1:
            drafter = self.drafter(tree, draft_vocab)
        return self.decoder_for(FixedPlan(tree, branch), drafter, ngrams=branch > 0, context=context)

    def decoder_for(self, plan: Plan, drafter: Drafter | None, *, ngrams: bool = False, context: int = 0) -> Decoder:
        """Make a decoder for any plan."""
        return Decoder(self.base(plan, context=context), plan, drafter, context or self.context, ngrams)

    def request(self, prompt: str, max_tokens: int, **more: Any) -> Request:
        """Make a request from text."""
        return Request(self.model.tokenize(prompt).tolist(), max_tokens, **more)


def find_heads(folder: Path, file: GGUFFile) -> Path | None:
    """Return the heads below `folder` that belong to a model.

    Of several: those made for this very file, in the folder named after it, the best of a run, the latest run.
    """
    wanted, fits = file.heads_fingerprint(), list[tuple[bool, bool, bool, float, Path]]()
    for path in folder.glob("**/config.json"):
        heads, facts = path.parent, _read_facts(path)
        if facts.get("heads_fingerprint") != wanted or any(p.startswith(".") for p in heads.relative_to(folder).parts):
            continue
        same = facts.get("base_fingerprint") == file.file_fingerprint()
        own = heads.relative_to(folder).parts[:1] in ((file.path.stem,), (file.path.name.split(".")[0],))
        unfinished = heads.name.startswith(("medusa_heads_latest", "medusa_heads_epoch"))
        fits.append((same, own, not unfinished, path.stat().st_mtime, heads))
    return max(fits)[-1] if fits else None


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}

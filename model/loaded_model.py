"""A loaded GGUF with the draft heads that belong to it: makes contexts, drafters and decoders.

The one place where heads meet decoding. Knows no command line and no environment, and not which
drafts are worth their time.
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.base.chat import ChatTemplate, user_turn
from model.base.cores import physical_memory, usable_cores
from model.base.llama import MAX_SEQUENCES, LlamaBase
from model.base.llama_model import LlamaModel
from model.base.lm_head import check_lm_head
from model.base.load_check import check_loads
from model.base.prompt import encode_prompt
from model.decoding.decoder import Decoder
from model.decoding.draft import ROOT_ONLY
from model.decoding.draft_policy import DraftPolicy, FixedPolicy
from model.decoding.drafters.drafter import (
    HEADS,
    NGRAM,
    RECYCLED,
    ContinuationDrafter,
    Drafters,
    RankingDrafter,
    TreeDrafter,
)
from model.decoding.drafters.ngram import NgramDrafter
from model.decoding.drafters.recycled import ContinuationMemory, RecycledDrafter
from model.decoding.prompt_cache import PromptCache
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.errors import HeadsError, ModelFileError, UsageError
from model.heads.known_heads import HEADS_FOLDER, find_heads
from model.storage.disk_room import human_size
from model.trees.tree import Tree

if TYPE_CHECKING:
    from model.heads.medusa import MedusaHeads

MIN_CONTEXT = 8  # tokens: a prompt, its answer, and room to measure steps
DEFAULT_CONTEXT = 4096  # tokens at the most, where nobody asks for a number
# Of the KV cache of many sequences, where nobody says how many cells; one context's at least.
MAX_SHARED_KV_BYTES = 1 << 30
KV_BYTES = {"f32": 4.0, "q8_0": 1.07, "q4_0": 0.57}  # of a number; 2 for the others


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded and run; most fields are the environment variables of the same names.

    context_size: 0: as trained, at most DEFAULT_CONTEXT. flash_attn: None: what is faster, see
    planning/flash_attention.py. k_heads: use the first so many heads; None: all. max_nodes: of a
    draft tree, its root included. prompt_cache_mb: MiB of host memory for what finished sequences
    leave. draft_memory_mb: MiB for recycled continuations; 0: there are none. share_draft_memory:
    all sequences share them.
    """

    n_threads: int = field(default_factory=usable_cores)
    context_size: int = 0
    n_gpu_layers: int = -1
    use_mmap: bool = True
    use_mlock: bool = False
    flash_attn: bool | None = None
    kv_type: str = "f16"
    k_heads: int | None = None
    max_nodes: int = 64
    prompt_cache_mb: int = 1024
    draft_memory_mb: int = 64
    share_draft_memory: bool = True


class LoadedModel:
    """A loaded base model with its draft heads, if it has any.

    The heads are loaded when they are first used. heads_path: folder or file of the heads; None:
    those below heads_folder that belong to the model. flash_attn: of the contexts that are made
    from now on; None: LlamaBase's choice. Raises ModelFileError where the file cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        options: LoadOptions,
        *,
        heads_path: Path | None = None,
        heads_folder: Path = HEADS_FOLDER,
    ) -> None:
        self.file = check_loads(path)
        self.options = options
        self.base_model = LlamaModel(
            path,
            n_gpu_layers=options.n_gpu_layers,
            use_mmap=options.use_mmap,
            use_mlock=options.use_mlock,
        )
        self.flash_attn = options.flash_attn
        self.context = options.context_size or min(self.base_model.n_ctx_train, DEFAULT_CONTEXT)
        self._check_context()
        self.heads_path = heads_path or find_heads(heads_folder, self.file)

    def _check_context(self) -> None:
        """Refuse a context that is too small to use, or that this machine could never hold."""
        if self.context < MIN_CONTEXT:
            raise UsageError(f"MODEL_CONTEXT_SIZE {self.context}: at least {MIN_CONTEXT} tokens")
        needed = self.context * self.kv_bytes_per_token
        memory = physical_memory()
        if memory and needed > memory:  # llama.cpp would be killed while it fills the pages
            raise UsageError(
                f"MODEL_CONTEXT_SIZE {self.context}: the KV cache needs {human_size(needed)}, this "
                f"machine has {human_size(memory)} of memory"
            )

    @cached_property
    def _loaded_heads(self) -> tuple[MedusaHeads, dict[str, Any]]:
        from model.heads.files import load_heads  # torch: loaded only when heads are used

        if self.heads_path is None:
            raise HeadsError(
                f"no heads for {self.file.path} are known; train them: "
                f"python model/train_medusa.py --base_model_path {self.file.path}"
            )
        if not self.base_model.can_roll_back:
            raise ModelFileError(
                f"{self.file.path}: {self.file.architecture} models are recurrent and cannot roll "
                "back a draft; use --draft none"
            )
        loaded = load_heads(self.heads_path, self.file)
        check_lm_head(self.base_model, self.file, self.options.n_threads)
        return loaded

    @property
    def heads(self) -> MedusaHeads:
        """The draft heads.

        Raises HeadsError when there are none or they don't fit, ModelFileError for the model.
        """
        return self._loaded_heads[0]

    @property
    def heads_facts(self) -> dict[str, Any]:
        """The contents of the heads' `config.json`."""
        return self._loaded_heads[1]

    @property
    def n_heads(self) -> int:
        """How many heads may be used; 0 where max_nodes leaves room for the root alone."""
        limit = self.options.k_heads or self.heads.config.k_heads
        return min(self.heads.config.k_heads, limit, self.options.max_nodes - 1)

    @property
    def kv_bytes_per_token(self) -> int:
        """About how many bytes of KV cache a token takes, with all attention heads of one size."""
        facts = self.file.metadata
        n_heads = facts.get(f"{self.file.architecture}.attention.head_count")
        n_kv_heads = facts.get(f"{self.file.architecture}.attention.head_count_kv")
        share = 1.0
        if isinstance(n_heads, int) and n_heads and isinstance(n_kv_heads, int):
            share = n_kv_heads / n_heads
        size = KV_BYTES.get(self.options.kv_type, 2.0)
        return max(1, int(2 * size * self.file.n_layer * self.file.n_embd * share))

    def check_tree(self, tree: Tree) -> Tree:
        """Return the tree. Raises UsageError where the heads cannot draft it within the limits."""
        if tree.max_depth > self.n_heads:
            raise UsageError(
                f"the tree is {tree.max_depth} deep, but {self.n_heads} heads may be used"
            )
        if len(tree) > self.options.max_nodes:
            raise UsageError(
                f"the tree has {len(tree)} nodes; "
                f"MEDUSA_MAX_TOKENS_PER_STEP allows {self.options.max_nodes}"
            )
        if tree.n_ranks > self.file.n_vocab:
            raise UsageError(
                f"the tree uses rank {tree.n_ranks - 1}, "
                f"the vocabulary has {self.file.n_vocab} tokens"
            )
        return tree

    def heads_drafter(
        self,
        tree: Tree,
        draft_vocab: int | None = None,
        *,
        ranks: int = 0,
        with_probs: bool = False,
    ) -> RankingDrafter:
        """Make the heads' drafter for a tree.

        draft_vocab: how many of the most frequent tokens it drafts from; 0: all that the heads
        know; None: those that they were taught with, or else those that make up 99.9 % of the
        training text. ranks: guesses per head; 0: as many as the tree uses.
        """
        from model.heads.draft_vocabulary import COVERAGE, covering
        from model.heads.hydra_drafter import drafter_for

        self.check_tree(tree)
        counts = self.heads_facts["token_counts"]
        if draft_vocab is None:
            draft_vocab = 0
            if counts is not None and not self.heads.config.draft_vocab:
                draft_vocab = covering(counts, COVERAGE)
        return drafter_for(
            self.heads,
            n_heads=tree.max_depth,
            ranks=ranks or tree.n_ranks,
            draft_vocab=draft_vocab,
            token_counts=counts,
            n_threads=self.options.n_threads,
            with_probs=with_probs,
        )

    def new_base(
        self,
        policy: DraftPolicy | None = None,
        kind: type[LlamaBase] = LlamaBase,
        *,
        n_seq_max: int = 0,
        n_ctx: int = 0,
        flash_attn: bool | None = None,
    ) -> LlamaBase:
        """Make a context: for plain decoding, or with room for all that a policy may draft.

        n_seq_max: how many ids there are; 0: as many as one sequence needs. n_ctx: tokens; 0: as
        the options say. flash_attn: None: the attribute of that name.
        """
        max_nodes = policy.max_nodes if policy else 1
        max_leaves = policy.max_leaves if policy else 1
        room_for_draft = max_nodes if max_nodes > 1 else 0
        return kind(
            self.base_model,
            n_ctx=(n_ctx or self.context) + room_for_draft,
            n_threads=self.options.n_threads,
            n_seq_max=n_seq_max or max_leaves,
            embeddings=max_nodes > 1,
            flash_attn=self.flash_attn if flash_attn is None else flash_attn,
            kv_type=self.options.kv_type,
        )

    def fixed_decoder(
        self,
        tree: Tree = ROOT_ONLY,
        drafter: TreeDrafter | None = None,
        *,
        continuation: int = 0,
        draft_vocab: int | None = None,
        n_ctx: int = 0,
    ) -> Decoder:
        """Make a decoder that drafts the same in every step; plain decoding without arguments.

        drafter: of the tree; None: the heads. continuation: the most tokens that n-grams add.
        """
        if drafter is None and len(tree) > 1:
            drafter = self.heads_drafter(tree, draft_vocab)
        drafters = new_drafters(drafter, {NGRAM} if continuation else ())
        return self.decoder(FixedPolicy(tree, continuation), drafters, n_ctx=n_ctx)

    def decoder(
        self,
        policy: DraftPolicy,
        drafters: Drafters,
        *,
        n_ctx: int = 0,
    ) -> Decoder:
        """Make a decoder for one sequence at a time with any policy."""
        base = self.new_base(policy, n_ctx=n_ctx)
        return Decoder(base, self.base_model, policy, drafters, context=n_ctx or self.context)

    def shared_decoder(
        self,
        policy: DraftPolicy,
        drafters: Drafters,
        *,
        n_parallel: int,
        n_cells: int = 0,
        max_stall_s: float = 0.0,
    ) -> Decoder:
        """Make a decoder for n_parallel sequences at a time, which share prefixes.

        n_cells: tokens that the KV cache holds for all of them; 0: a context for each, as far as
        MAX_SHARED_KV_BYTES go. max_stall_s: see Scheduler. Raises UsageError where llama.cpp's
        limits are too low for that many.
        """
        # Sequence ids.
        n_seq_max = n_parallel * policy.max_leaves
        if n_seq_max > MAX_SEQUENCES:
            raise UsageError(
                f"{n_parallel} sequences at a time, of {policy.max_leaves} leaves each: "
                f"llama.cpp has {MAX_SEQUENCES} sequence ids"
            )

        # KV cells.
        affordable = min(self.context * n_parallel, MAX_SHARED_KV_BYTES // self.kv_bytes_per_token)
        n_cells = max(n_cells or affordable, self.context)
        n_cells += (n_parallel - 1) * (policy.max_nodes - 1)  # new_base adds the first draft's room

        # The context.
        base = self.new_base(policy, n_seq_max=n_seq_max, n_ctx=n_cells)
        if isinstance(policy, FixedPolicy) and n_parallel * policy.max_nodes > base.n_batch:
            base.close()
            raise UsageError(
                f"{n_parallel} sequences at a time, of {policy.max_nodes} nodes each: "
                f"a step has {base.n_batch} rows"
            )
        prompt_cache = None
        if self.base_model.can_roll_back:  # a saved prefix has to lose its end
            prompt_cache = PromptCache(self.options.prompt_cache_mb << 20)
        return Decoder(
            base,
            self.base_model,
            policy,
            drafters,
            context=self.context,
            max_running=n_parallel,
            prompt_cache=prompt_cache,
            max_stall_s=max_stall_s,
        )

    def request(
        self,
        prompt: str,
        max_tokens: int,
        sampling: SamplingParams,
        *,
        template: ChatTemplate | None = None,
        stop: tuple[str, ...] = (),
    ) -> Request:
        """Make a request from text: a user's turn in a chat template, or a text to go on with."""
        if template is None:
            tokens = encode_prompt(self.base_model, prompt)
        else:
            tokens = encode_prompt(self.base_model, [user_turn(prompt)], template)
        return Request(prompt=tokens, max_tokens=max_tokens, sampling=sampling, stop=stop)

    def close(self) -> None:
        """Free the weights; decoders must be closed before."""
        self.base_model.close()


def new_drafters(
    heads: TreeDrafter | None,
    sources: abc.Collection[str],
    *,
    memory_mb: int = 64,
    share_memory: bool = True,
) -> Drafters:
    """Return the drafters of a decoder: the heads' if there are any, and those of `sources`.

    memory_mb, share_memory: of recycled continuations, see LoadOptions.
    """
    continuations = dict[str, abc.Callable[[list[int]], ContinuationDrafter]]()
    shared = ContinuationMemory(memory_mb)
    if NGRAM in sources:
        continuations[NGRAM] = NgramDrafter
    if RECYCLED in sources and memory_mb:

        def recycled(tokens: list[int]) -> ContinuationDrafter:
            return RecycledDrafter(
                tokens, shared if share_memory else ContinuationMemory(memory_mb)
            )

        continuations[RECYCLED] = recycled
    return Drafters({} if heads is None else {HEADS: heads}, continuations, shared.clear)

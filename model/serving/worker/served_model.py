"""The served model: runs all sequence requests through one scheduler, and returns their events.

Where this machine does not know the model yet, it begins without drafts, and measures in slices
when nothing runs. Knows no process and no HTTP; its owner calls `work` as long as it is `busy`, and
`measure` while it is `measuring` and not busy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from model.base.chat import chosen_template, template_of
from model.base.grammar import GbnfGrammar, schema_to_gbnf
from model.base.llama import MAX_SEQUENCES
from model.base.prompt import encode_prompt
from model.decoding.decoder import Decoder
from model.decoding.draft_policy import FixedPolicy
from model.decoding.drafters.drafter import Drafters
from model.decoding.drafters.sources import source_names
from model.decoding.request import Request
from model.decoding.sampling import SamplingParams
from model.decoding.sequence import Sequence, check_tokens
from model.errors import MedusaError, UsageError
from model.heads.known_heads import HEADS_FOLDER
from model.loaded_model import LoadedModel, LoadOptions
from model.planning.choice import Drafting, DraftOptions, choose_in_slices, trial_requests
from model.serving.worker.messages import (
    Event,
    Failed,
    Finished,
    ModelInfo,
    SequenceRequest,
    Started,
    TextChunk,
)
from model.trees.slices import Slices, begin

log = logging.getLogger(__name__)
MAX_STALL_S = 0.1  # that prefill may hold up running sequences between two steps
UNMEASURED = "nothing yet: what drafts cost and bring is measured while no request runs"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is loaded and how it is shared.

    slots: sequences at a time. cells: tokens that the KV cache holds for all of them; 0: see
    shared_decoder. draft: what drafts where a request says "auto".
    """

    model_path: Path
    load: LoadOptions
    heads_path: Path | None = None
    heads_folder: Path = HEADS_FOLDER
    slots: int = 4
    cells: int = 0
    draft: DraftOptions = field(default_factory=DraftOptions)
    log_level: str = "WARNING"


class ServedModel:
    """The model and the sequences that it runs.

    Raises MedusaError where it cannot be loaded as asked.
    """

    def __init__(self, options: ModelOptions) -> None:
        # The model, and what drafts.
        loaded = self._loaded = LoadedModel(
            options.model_path,
            options.load,
            heads_path=options.heads_path,
            heads_folder=options.heads_folder,
        )
        self._model = loaded.base_model
        self._template = template_of(loaded.file.metadata)
        self._options = options

        # What runs its sequences.
        drafting = self._begin_to_choose()
        self._decoder = self._new_decoder(drafting)
        self._sequences: dict[str, tuple[SequenceRequest, Sequence]] = {}
        self._started = set[str]()  # ids whose prefill was reported
        self._failed = list[Event]()

        # What its parent is told.
        tokens = loaded.file.metadata["tokenizer.ggml.tokens"]
        self.info = ModelInfo(
            name=loaded.file.name,
            file_type=loaded.file.file_type,
            context=loaded.context,
            vocabulary=self._model.n_vocab,
            draft=drafting.description,
            slots=options.slots,
            cells=self._decoder.base.n_ctx,
            has_chat_template="tokenizer.chat_template" in loaded.file.metadata,
            longest_token=max(len(token.encode()) for token in tokens),
            measuring=self.measuring,
        )

    def _begin_to_choose(self) -> Drafting:
        """Return how to draft; where that must be measured first, not at all until it is."""
        template = chosen_template(self._loaded.file.metadata, "auto")
        trial = trial_requests(self._loaded, SamplingParams(), template)
        slices = choose_in_slices(
            self._loaded,
            self._options.draft,
            trial,
            max_leaves=MAX_SEQUENCES // self._options.slots,
        )
        self._slices: Slices[Drafting] | None = None
        known = begin(slices)
        if known is not None:
            return known
        self._slices = slices
        return Drafting(FixedPolicy(), Drafters(), UNMEASURED)

    def _new_decoder(self, drafting: Drafting) -> Decoder:
        return self._loaded.shared_decoder(
            drafting.policy,
            drafting.drafters,
            n_parallel=self._options.slots,
            n_cells=self._options.cells,
            max_stall_s=MAX_STALL_S,
        )

    @property
    def measuring(self) -> bool:
        """Whether there is something left to measure."""
        return self._slices is not None

    def measure(self, *, disturbed: bool) -> bool:
        """Measure one slice more; say whether that was the last one and `info` has changed.

        With the last one the KV cache becomes a new one, whose sequences are drafted for as is
        fastest. disturbed: something else ran during the slice before. Only while it is not busy.
        """
        assert self._slices is not None and not self._sequences
        try:
            self._slices.send(disturbed)
            return False
        except StopIteration as done:
            drafting: Drafting = done.value
        except Exception:  # go on as before; the next start tries again
            log.exception("what drafts cost and bring could not be measured")
            self._slices = None
            self.info = replace(self.info, draft="nothing", measuring=False)
            return True
        self._slices = None
        self._decoder.base.close()  # first: there may be no room for both caches
        try:
            self._decoder = self._new_decoder(drafting)
        except MedusaError:  # drafts take more room; without them there was enough
            log.exception("no room to draft")
            drafting = Drafting(FixedPolicy(), Drafters(), "nothing: no room to draft")
            self._decoder = self._new_decoder(drafting)
        cells = self._decoder.base.n_ctx
        self.info = replace(self.info, draft=drafting.description, cells=cells, measuring=False)
        log.info("measured; drafts: %s", drafting.description)
        return True

    @property
    def busy(self) -> bool:
        """Whether there is anything to do without a further command."""
        return bool(self._sequences or self._failed)

    @property
    def n_cached(self) -> int:
        """Tokens in the KV cache."""
        return self._decoder.scheduler.kv_slots.n_cached

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the ids of a text. This and the next two may be called from another thread."""
        tokens = self._model.tokenize(text, add_bos=add_special, parse_special=parse_special)
        return [int(token) for token in tokens]

    def detokenize(self, tokens: list[int]) -> str:
        """Return the text of ids."""
        check_tokens(tokens, self._model.n_vocab)
        return self._model.detokenize(tokens)

    def apply_template(self, messages: list[dict[str, Any]]) -> str:
        """Return a conversation as the model's template renders it."""
        return self._template.render(messages, prompt=True)

    def submit(self, request: SequenceRequest) -> None:
        """Queue a request, or fail it where it cannot be generated."""
        try:
            sequence = self._new_sequence(request)
            self._decoder.scheduler.add(sequence)
        except MedusaError as error:
            self._failed.append(Failed(request.id, "bad_request", str(error)))
            return
        self._sequences[request.id] = (request, sequence)

    def _new_sequence(self, request: SequenceRequest) -> Sequence:
        if request.draft in ("heads", "both") and self._loaded.heads_path is None:
            raise UsageError(f"draft {request.draft!r}: this model has no heads")
        grammar = None
        if request.grammar is not None or request.json_schema is not None:
            gbnf = request.grammar
            if gbnf is None:
                gbnf = schema_to_gbnf(request.json_schema or {})
            grammar = GbnfGrammar(self._model, gbnf)
        prompt = encode_prompt(self._model, request.prompt, self._template, parse_special=True)
        return self._decoder.new_sequence(
            Request(
                prompt=prompt,
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                stop=request.stop,
            ),
            sources=source_names(request.draft),
            grammar=grammar,
            typical_acceptance=request.typical_acceptance,
            logprobs=request.logprobs,
            echo=request.echo,
            use_prefix_cache=request.use_prefix_cache,
        )

    def cancel(self, id: str) -> None:
        """Abort a sequence; one that is unknown or finished is no error."""
        if id in self._sequences:
            _, sequence = self._sequences.pop(id)
            self._started.discard(id)
            self._decoder.scheduler.abort(sequence)

    def work(self) -> list[Event]:
        """Take all sequences one step further; return what has happened."""
        events = self._failed
        self._failed = []
        if not self._sequences:
            return events
        try:
            self._decoder.scheduler.step()
            for request, sequence in list(self._sequences.values()):
                events += self._events(request, sequence)
        except Exception:  # not one sequence's fault; all cells may be in disorder
            log.exception("a step failed")
            events += self._start_over()
        return events

    def _start_over(self) -> list[Event]:
        """Empty the KV cache; fail the sequences that were in it, queue the waiting ones anew."""
        waiting = self._decoder.scheduler.waiting
        if len(waiting) == len(self._sequences):  # admitting them is what failed
            waiting = []
        self._decoder.reset()
        for sequence in waiting:
            self._decoder.scheduler.add(sequence)
        events = list[Event]()
        for id, (_, sequence) in list(self._sequences.items()):
            if sequence not in waiting:
                why = "the model could not go on with this sequence"
                events.append(Failed(id, "internal", why))
                del self._sequences[id]
                self._started.discard(id)
        return events

    def _events(self, request: SequenceRequest, sequence: Sequence) -> list[Event]:
        """Return what a step has brought a sequence."""
        if not (sequence.n_new or sequence.finished):
            return []
        events = list[Event]()
        if request.id not in self._started:
            self._started.add(request.id)
            events.append(Started(request.id, sequence.n_prompt, sequence.n_reused))
            if request.echo:
                prompt = sequence.prompt_output()
                events.append(TextChunk(request.id, prompt.text, prompt.tokens))
        output = sequence.take_output()
        if output.text or output.tokens:
            events.append(TextChunk(request.id, output.text, output.tokens))
        if sequence.finished:
            events.append(_finished(request.id, sequence))
            del self._sequences[request.id]
            self._started.discard(request.id)
        return events


def _finished(id: str, sequence: Sequence) -> Finished:
    statistics = sequence.statistics
    assert sequence.finish_reason is not None
    return Finished(
        id=id,
        reason=sequence.finish_reason,
        prompt_tokens=sequence.n_prompt,
        new_tokens=sequence.n_new,
        prompt_s=sequence.prefilled_at - sequence.admitted_at,
        predicted_s=perf_counter() - sequence.prefilled_at,
        steps=statistics.steps,
        drafted=sum(statistics.drafted),
        accepted=sum(statistics.accepted),
        accepted_per_depth=tuple(statistics.accepted),
        drafted_by_source=dict(statistics.drafted_by_source),
        accepted_by_source=dict(statistics.accepted_by_source),
    )

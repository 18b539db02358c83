"""The local model as a source of answers, and of questions to answer: as many at once as pay.

Knows nothing of the files that answers go to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator

import click

from model.base.chat import ChatTemplate
from model.base.llama_model import LlamaModel
from model.errors import DataError
from model.training.data.prompts import Prompt, own_prompt
from model.training.data.token_encoder import PartEncoder
from model.training.distillation.answers import DistilledAnswer
from model.training.distillation.base_model_answers import answer_with_base
from model.training.distillation.dialogue import Dialogue, opening
from model.training.distillation.endpoint import Endpoint, Exchange, answer_with_endpoint
from model.training.distillation.options import OWN_QUESTIONS, DistillOptions
from model.training.distillation.parallelism import measured_parallelism
from model.training.distillation.progress_bar import ProgressBar
from model.training.distillation.question_file import QuestionFile
from model.training.distillation.question_writer import QuestionWriter
from model.training.distillation.shared_prefixes import PrefixSharingBase, sequences_of
from model.training.distillation.transcript import answer_of_text

Tick = Callable[[int], None]  # is given the number of tokens that came just now
# A prompt's id, and its answer or why there is none.
Outcomes = Generator[tuple[str, DistilledAnswer | str], None, None]


class LocalSource:
    """Answers prompts, and writes them, many at once.

    max_length: tokens of a prompt with its answers. fingerprint: of the file. flash_attn: None: as
    is faster. kv_type: of the cache.
    """

    def __init__(
        self,
        options: DistillOptions,
        model: LlamaModel,
        template: ChatTemplate,
        *,
        max_length: int,
        fingerprint: str,
        n_threads: int,
        flash_attn: bool | None,
        kv_type: str,
    ) -> None:
        self._options = options
        self._fingerprint = fingerprint
        self._n_threads = n_threads
        self._flash_attn = flash_attn
        self._kv_type = kv_type
        self._model = model
        self._template = template
        self._max_length = max_length
        self._encoder = PartEncoder(model)

    def answers(self, prompts: list[Prompt], tick: Tick) -> Outcomes:
        """Yield the answers as they come."""
        options = self._options
        max_length = self._longest(prompts)
        parallel, base = self._context(len(prompts), max_length)
        dialogues = (
            Dialogue(prompt, self._model, self._encoder, self._template) for prompt in prompts
        )
        with base:
            for dialogue in answer_with_base(
                base, dialogues, self._model,
                lambda dialogue: options.sampling(dialogue.prompt, len(dialogue.spans)),
                parallel=parallel, max_length=max_length, max_new_tokens=options.max_new_tokens,
                cut_loops=options.loops == "cut", on_tokens=tick,
            ):  # fmt: skip
                temperature = options.sampling(dialogue.prompt, 0).temperature
                yield dialogue.prompt.id, dialogue.problem or dialogue.result(temperature)

    def _longest(self, prompts: list[Prompt]) -> int:
        """Return how many tokens the longest prompt and its answer may come to."""
        longest = 1
        for prompt in prompts:
            users = [turn for turn in prompt.turns if turn["role"] == "user"]
            if len(users) > 1:  # how long a conversation gets is not known before
                return self._max_length
            dialogue = Dialogue(prompt, self._model, self._encoder, self._template)
            if not dialogue.ask(self._max_length):  # which is said when its turn comes
                return self._max_length
            longest = max(longest, len(dialogue.ids))
        return min(self._max_length, longest + self._options.max_new_tokens)

    def answers_from(self, endpoint: Endpoint, prompts: list[Prompt], tick: Tick) -> Outcomes:
        """Yield an endpoint's answers, with the model's ids for them."""
        options = self._options
        asked: dict[str, Prompt] = {}

        def exchanges() -> Iterator[Exchange]:
            for prompt in prompts:
                asked[prompt.id] = prompt
                n_questions = max(1, len(prompt.turns))
                yield Exchange(
                    id=prompt.id,
                    turns=prompt.turns,
                    text="" if prompt.turns else opening(prompt, self._model, self._encoder),
                    sampling=[options.sampling(prompt, turn) for turn in range(n_questions)],
                    max_tokens=options.max_new_tokens,
                )

        # Their ids, as they come.
        for exchange in answer_with_endpoint(endpoint, exchanges(), options.concurrency):
            prompt = asked.pop(exchange.id)
            if exchange.problem:
                yield prompt.id, exchange.problem
                continue
            temperature = exchange.sampling[0].temperature
            try:
                answer = answer_of_text(
                    prompt, exchange.messages, exchange.reasons, self._model, self._encoder,
                    self._template, temperature,
                    cut_loops=options.loops == "cut",
                )  # fmt: skip
            except DataError as error:
                yield prompt.id, str(error)
                continue
            tick(sum(end - start for start, end in answer.spans))
            yield prompt.id, answer

    def ask_itself(self, file: QuestionFile) -> list[Prompt]:
        """Return as many questions of the model's own as are wanted.

        Those that the file holds already come first, new ones are added to it.
        """
        options = self._options
        style = options.question_style()
        wanted = options.max_prompts or OWN_QUESTIONS
        writer = QuestionWriter(self._template, self._encoder, self._model, style)
        if not writer.steered:
            click.echo("        the chat template takes no system prompt: language and kinds are")
            click.echo("        what the model likes")
        if len(file.kept) < wanted:
            max_length = min(self._max_length, writer.longest_opening + style.longest)
            parallel, base = self._context(wanted, max_length)
            bar = ProgressBar(wanted, len(file.kept), "questions")
            written = writer.write(
                base, self._model.n_vocab, file, wanted, parallel=parallel, max_length=max_length,
                on_tokens=bar.tick,
            )  # fmt: skip
            with base, contextlib.closing(bar), contextlib.closing(written):
                for question in written:
                    if not question.dropped:
                        bar.end("")
        return [
            own_prompt(number, question.number, question.text)
            for number, question in enumerate(file.kept[:wanted])
        ]

    def _context(self, n_prompts: int, max_length: int) -> tuple[int, PrefixSharingBase]:
        """Return the context for as many sequences as are fastest, and their number."""
        fastest = measured_parallelism(
            self._model, self._fingerprint, asked=self._options.parallel, max_length=max_length,
            n_threads=self._n_threads, flash_attn=self._flash_attn, kv_type=self._kv_type,
        )  # fmt: skip
        parallel = min(fastest.n, max(1, n_prompts))
        base = sequences_of(
            self._model, max_length, parallel, n_threads=self._n_threads,
            flash_attn=fastest.flash_attn, kv_type=self._kv_type,
        )  # fmt: skip
        return parallel, base

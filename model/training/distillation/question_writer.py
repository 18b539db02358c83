"""Questions that the model writes itself: sampled many at once, judged one by one in their order.

A question's number decides its kind, its temperature and its seed. Knows no options.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count

from model.base.chat import ChatTemplate
from model.decoding.sampling import SamplingParams
from model.decoding.step import Base
from model.errors import DataError
from model.training.data.token_encoder import PartEncoder
from model.training.distillation.base_model_answers import answer_with_base
from model.training.distillation.dialogue import LEAST_ROOM, Speaker, prompt_seed
from model.training.distillation.question_file import Question, QuestionFile
from model.training.distillation.question_filter import QuestionFilter
from model.training.distillation.question_kinds import system_prompts
from model.training.distillation.user_turn import UserTurn, open_user_turn

# Of the last so many questions, one in TRUST must have been kept: else the model can't write any.
WINDOW = 256
TRUST = 20
# A token must be this likely beside the likeliest: without it a small model (135 M parameters) at
# temperature 1 soon writes noise that never ends.
MIN_P = 0.1


@dataclass(frozen=True, kw_only=True)
class QuestionStyle:
    """How questions are asked for.

    language: told by the system prompts. temperatures: in turn. longest: tokens of a question.
    """

    language: str
    temperatures: tuple[float, ...]
    longest: int
    seed: int


@dataclass(frozen=True)
class _Vocabulary:
    """The model's, with the tokens that end a user's turn."""

    n_vocab: int
    eog: frozenset[int]
    piece: Callable[[int], bytes]


class _Draft:
    """A question while it is written."""

    def __init__(self, number: int, turn: UserTurn) -> None:
        self.number = number
        self.ids = list[int]()
        self.tokens: list[int] | None = None
        self.finish_reason = ""
        self._turn = turn

    def ask(self, max_length: int) -> bool:
        """Open the user's turn; False where the question is written."""
        if self.tokens is not None:
            return False
        self.ids = list(self._turn.ids)
        return len(self.ids) + LEAST_ROOM <= max_length

    def answer(self, tokens: list[int], finish_reason: str) -> None:
        """Take the question."""
        self.tokens = tokens
        self.finish_reason = finish_reason


class QuestionWriter:
    """Writes questions into a file, behind those that it holds already.

    Raises DataError where the template's user turn cannot be opened. steered: whether the template
    takes system prompts; without them, language and kinds are what the model likes.
    """

    def __init__(
        self, template: ChatTemplate, encoder: PartEncoder, speaker: Speaker, style: QuestionStyle
    ) -> None:
        self._speaker = speaker
        self._style = style
        plain = open_user_turn(template, encoder, speaker)
        self._kinds: list[tuple[str, UserTurn]] = [("", plain)]
        self.steered = True
        try:
            self._kinds = [
                (system, open_user_turn(template, encoder, speaker, system))
                for system in system_prompts(style.language)
            ]
        except DataError:
            self.steered = False
        self.longest_opening = max(len(turn.ids) for _, turn in self._kinds)

    def sampling(self, number: int) -> SamplingParams:
        """Return how a question is sampled: each kind meets each temperature."""
        temperatures = self._style.temperatures
        temperature = temperatures[number // len(self._kinds) % len(temperatures)]
        seed = prompt_seed(self._style.seed, f"question {number}", 0)
        return SamplingParams(temperature=temperature, min_p=MIN_P, seed=seed)

    def write(
        self,
        base: Base,
        n_vocab: int,
        file: QuestionFile,
        wanted: int,
        *,
        parallel: int,
        max_length: int,
        on_tokens: Callable[[int], None] = lambda _: None,
    ) -> Generator[Question, None, None]:
        """Yield questions as they are judged and written down, until `wanted` are kept.

        base: as `answer_with_base` needs it; it is left with cells in use. Raises DataError where
        hardly one is kept.
        """
        judge = QuestionFilter(self._style.language)
        for question in file.kept:
            judge.objection(question.text, "stop", "")
        n_kept = len(file.kept)
        if n_kept >= wanted:
            return
        plain = self._kinds[0][1]
        drafts = answer_with_base(
            base,
            (_Draft(number, self._kind(number)[1]) for number in count(len(file.questions))),
            _Vocabulary(n_vocab, plain.eog, self._speaker.piece),
            lambda draft: self.sampling(draft.number),
            parallel=parallel, max_length=max_length, max_new_tokens=self._style.longest,
            stop=plain.stop, on_tokens=on_tokens,
        )  # fmt: skip
        # Judged in their order, whichever is finished first: so the same ones are kept each time.
        early: dict[int, _Draft] = {}
        for draft in drafts:
            early[draft.number] = draft
            while (following := early.pop(len(file.questions), None)) is not None:
                question = self._judged(following, judge)
                file.add(question)
                yield question
                n_kept += not question.dropped
                if n_kept >= wanted:
                    return
                self._require_some(file)

    def _kind(self, number: int) -> tuple[str, UserTurn]:
        """Return system prompt and opened turn of a question."""
        return self._kinds[number % len(self._kinds)]

    def _judged(self, draft: _Draft, judge: QuestionFilter) -> Question:
        system, turn = self._kind(draft.number)
        text = turn.message(self._speaker.detokenize(draft.tokens or []))
        dropped = judge.objection(text, draft.finish_reason, system)
        return Question(number=draft.number, text=text, dropped=dropped)

    def _require_some(self, file: QuestionFile) -> None:
        """Raise DataError where hardly one of the last questions was kept."""
        last = file.questions[-WINDOW:]
        reasons = Counter(question.dropped for question in last if question.dropped)
        if len(last) == WINDOW and sum(reasons.values()) > WINDOW - WINDOW // TRUST:
            (reason, times), *_ = reasons.most_common(1)
            raise DataError(
                f"of the last {WINDOW} questions that the model wrote, {sum(reasons.values())} "
                f"were dropped ({times}: {reason}); name prompts with --prompts"
            )

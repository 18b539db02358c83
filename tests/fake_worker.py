"""A worker without a model: it generates text that follows from prompt and seed, in steps.

It keeps what `worker_contract.py` asks of any worker: slots, a queue, events in order.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from model.decoding.detokenizer import Detokenizer
from model.decoding.sequence import FinishReason, TokenOutput, check_prompt
from model.errors import DataError, MedusaError, UsageError
from model.serving.worker.messages import (
    Failed,
    Finished,
    ModelInfo,
    SequenceRequest,
    Started,
    TextChunk,
)
from model.serving.worker.protocol import Deliver, Overloaded, WorkerError

LETTERS = 'abcdefgh \n\u2028\x85"\\<é€😀'
BOS = 1
N_VOCAB = 0x110000  # tokens are code points
SHUTTING_DOWN = "the server is shutting down"


@dataclass
class Alive:
    """A sequence that waits or runs."""

    task: asyncio.Task[None]
    deliver: Deliver


class FakeWorker:
    """A step emits one token and up to two accepted draft tokens. Prompts in capitals misbehave.

    requests: all that were submitted. cancelled: all ids that were cancelled. alive: by id.
    refusal: why the model cannot be loaded. closed_with: the deadline of `close`.
    """

    def __init__(
        self, *, slots: int = 2, max_queue: int = 4, step_s: float = 0.0, context: int = 512
    ) -> None:
        self.info = ModelInfo(
            name="fake",
            file_type="F32",
            context=context,
            vocabulary=N_VOCAB,
            draft="three heads",
            slots=slots,
            cells=slots * context,
            has_chat_template=True,
        )
        self.ready = True
        self.max_queue = max_queue
        self.step_s = step_s
        self.requests: list[SequenceRequest] = []
        self.cancelled: list[str] = []
        self.alive: dict[str, Alive] = {}
        self.refusal = ""
        self.closed_with: float | None = None
        self.cells_used = 0
        self._slots = asyncio.Semaphore(slots)

    async def wait_ready(self) -> None:
        if self.refusal:
            raise WorkerError(self.refusal)

    @property
    def running(self) -> int:
        return min(len(self.alive), self.info.slots)

    @property
    def queue_length(self) -> int:
        return len(self.alive) - self.running

    def submit(self, request: SequenceRequest, deliver: Deliver) -> None:
        if not self.ready or len(self.alive) >= self.info.slots + self.max_queue:
            raise Overloaded(3.4)
        if request.prompt == "RAISE":
            raise RuntimeError("a fault of ours")
        self.requests.append(request)
        task = asyncio.create_task(self._run(request, deliver))
        self.alive[request.id] = Alive(task, deliver)

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        sequence = self.alive.pop(id, None)
        if sequence is not None:
            sequence.task.cancel()

    async def _run(self, request: SequenceRequest, deliver: Deliver) -> None:
        try:
            async with self._slots:
                await self._generate(request, deliver)
        except MedusaError as error:
            deliver(Failed(request.id, "bad_request", str(error)))
        finally:
            self.alive.pop(request.id, None)

    async def _generate(self, request: SequenceRequest, deliver: Deliver) -> None:
        prompt = await self._prompt(request)
        check_prompt([ord(char) for char in prompt], N_VOCAB, self.info.context)
        if request.max_tokens == 0 and not request.echo:
            raise UsageError("max_tokens 0 is below 1")
        if prompt == "FAIL":
            message = "the worker died\nTraceback (most recent call last): …"
            deliver(Failed(request.id, "internal", message))
            return
        await asyncio.sleep(self.step_s)
        deliver(Started(request.id, len(prompt), len(prompt) // 2))
        if request.echo:
            tokens = [self._token(request, ord(char), False, char) for char in prompt]
            tokens[0] = TokenOutput(tokens[0].id, tokens[0].text, False)  # nothing lies before it
            deliver(TextChunk(request.id, prompt, tuple(tokens)))

        most = self.info.context - len(prompt)
        if request.max_tokens is not None:
            most = min(most, request.max_tokens)
        sampling = request.sampling
        dice = random.Random(f"{prompt} {sampling.seed} {sampling.temperature}")
        detokenizer = Detokenizer(lambda token: chr(token).encode(), request.stop)
        pending: deque[tuple[int, bool]] = deque()  # tokens whose text is not certain yet
        accepted_per_depth = [0, 0]
        new_tokens = 0
        steps = 0
        reason: FinishReason | None = None if most else "length"
        while reason is None:
            await asyncio.sleep(self.step_s)
            if prompt == "FAIL LATER" and steps == 3:
                deliver(Failed(request.id, "internal", "the worker died"))
                return
            most_accepted = 0 if request.draft == "none" else 2
            n_accepted = min(dice.randint(0, most_accepted), most - new_tokens - 1)
            steps += 1
            for depth in range(n_accepted + 1):
                token = ord(dice.choice(LETTERS))
                drafted = depth < n_accepted
                pending.append((token, drafted))
                new_tokens += 1
                if drafted:
                    accepted_per_depth[depth] += 1
                if detokenizer.add(token):
                    reason = "stop"
                    break
            if reason is None and new_tokens == most:
                reason = "length"
            text, token_texts = detokenizer.take(last=reason is not None)
            tokens = [
                self._token(request, *pending.popleft(), text=token_text)
                for token_text in token_texts
            ]
            if text or tokens:
                deliver(TextChunk(request.id, text, tuple(tokens)))
        drafting = request.draft != "none"
        deliver(
            Finished(
                id=request.id,
                reason=reason,
                prompt_tokens=len(prompt),
                new_tokens=new_tokens,
                prompt_s=0.25,
                predicted_s=0.5,
                steps=steps,
                drafted=2 * steps if drafting else 0,
                accepted=sum(accepted_per_depth),
                accepted_per_depth=tuple(accepted_per_depth),
                drafted_by_source={"heads": steps, "ngram": steps} if drafting else {},
                accepted_by_source=dict(zip(("heads", "ngram"), accepted_per_depth, strict=True)),
            )
        )

    def _token(self, request: SequenceRequest, token: int, drafted: bool, text: str) -> TokenOutput:
        if request.logprobs is None:
            return TokenOutput(token, text, drafted)
        top = [(text, -0.5), ("x", -1.5), ("y", -float("inf"))]
        return TokenOutput(token, text, drafted, -0.5, tuple(top[: request.logprobs]))

    async def _prompt(self, request: SequenceRequest) -> str:
        prompt = request.prompt
        if isinstance(prompt, str):
            return prompt
        messages = [part for part in prompt if isinstance(part, dict)]
        if messages:
            return await self.apply_template(messages)
        return await self.detokenize([part for part in prompt if isinstance(part, int)])

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        begin = [BOS] if add_special else []
        return begin + [ord(char) for char in text]

    async def detokenize(self, tokens: list[int]) -> str:
        if tokens == [666]:
            raise WorkerError("the model's process has died")
        return "".join(map(chr, tokens))

    async def apply_template(self, messages: list[dict[str, Any]]) -> str:
        if messages[0]["role"] == "tool":
            raise DataError(
                "the model's chat template refuses a conversation: it begins with a tool"
            )
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"

    async def close(self, deadline_s: float) -> None:
        self.closed_with = deadline_s
        self.ready = False
        end = time.monotonic() + deadline_s
        while self.alive and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for id, sequence in list(self.alive.items()):
            sequence.task.cancel()
            del self.alive[id]
            sequence.deliver(Failed(id, "internal", SHUTTING_DOWN))

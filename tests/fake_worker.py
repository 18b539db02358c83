"""A worker without a model: writes a text that follows from prompt and seed, in steps, with slots and a queue."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

from model.errors import DataError
from model.serving.jobs import Event, Failed, Finished, Job, ModelInfo, Piece, Started, TokenInfo
from model.serving.protocol import Overloaded, WorkerError

LETTERS = 'abcdefgh \n\u2028\x85"\\<é€😀'
BOS = 1


class FakeWorker:
    """Tokens are code points; a step wins one token and up to two drafted ones. Prompts in capitals misbehave."""

    def __init__(self, *, slots: int = 2, max_queue: int = 4, step_s: float = 0.0, context: int = 512) -> None:
        self.info = ModelInfo("fake", "F32", context, 0x110000, "three heads", slots, slots * context, True)
        self.ready = True
        self.max_queue, self.step_s = max_queue, step_s
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.refusal = ""
        self.closed_with: float | None = None
        self.ended = False
        self.alive: set[str] = set()
        self.cached = 0
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

    def submit(self, job: Job) -> AsyncIterator[Event]:
        if len(self.alive) >= self.info.slots + self.max_queue:
            raise Overloaded(3.4)
        self.jobs.append(job)
        self.alive.add(job.id)
        return self._run(job)

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        self.alive.discard(id)

    async def _run(self, job: Job) -> AsyncIterator[Event]:
        try:
            async with self._slots:
                async for event in self._write(job):
                    yield event
        finally:
            self.alive.discard(job.id)

    async def _write(self, job: Job) -> AsyncIterator[Event]:
        prompt = await self._prompt(job)
        if len(prompt) >= self.info.context:
            message = f"the prompt has {len(prompt)} tokens, the context {self.info.context}"
            yield Failed(job.id, "bad_request", message)
            return
        if prompt == "FAIL":
            yield Failed(job.id, "internal", "the worker died\nTraceback (most recent call last): …")
            return
        if prompt == "RAISE":
            raise RuntimeError("a fault of ours")
        await asyncio.sleep(self.step_s)
        yield Started(job.id, len(prompt), len(prompt) // 2)
        if job.echo:
            yield Piece(job.id, prompt, tuple(self._token(job, c, False, i == 0) for i, c in enumerate(prompt)))
        room = self.info.context - len(prompt)
        most = room if job.max_tokens is None else min(job.max_tokens, room)
        dice = random.Random(f"{prompt} {job.sampling.seed} {job.sampling.temperature}")
        text, told, steps, accepted, reason = "", 0, 0, 0, "length"
        hold = max((len(s) for s in job.stop), default=1) - 1
        while len(text) < most and reason == "length":
            await asyncio.sleep(self.step_s)
            if job.id not in self.alive:
                return
            if self.ended:
                yield Failed(job.id, "internal", "the server is shutting down")
                return
            if prompt == "BREAK" and steps == 3:
                return
            if prompt == "FAIL LATER" and steps == 3:
                yield Failed(job.id, "internal", "the worker died")
                return
            n = min(1 if job.draft == "none" else dice.randint(1, 3), most - len(text))
            won = [dice.choice(LETTERS) for _ in range(n)]
            tokens = tuple(self._token(job, c, i < n - 1) for i, c in enumerate(won))
            text += "".join(won)
            steps, accepted = steps + 1, accepted + n - 1
            ends = [at for s in job.stop if (at := text.find(s)) >= 0]
            if ends:
                text, reason = text[: min(ends)], "stop"
            until = len(text) if ends or len(text) >= most else max(told, len(text) - hold)
            yield Piece(job.id, text[told:until], tokens)
            told = until
        depths = (accepted, 0)
        yield Finished(
            job.id, "stop" if reason == "stop" else "length",
            len(prompt), len(text), 0.25, 0.5, steps, 2 * steps, accepted, depths,
        )  # fmt: skip

    def _token(self, job: Job, char: str, drafted: bool, first: bool = False) -> TokenInfo:
        if job.logprobs is None or first:
            return TokenInfo(ord(char), char, drafted)
        top = [(char, -0.5), ("x", -1.5), ("y", -float("inf"))][: job.logprobs]
        return TokenInfo(ord(char), char, drafted, -0.5, tuple(top))

    async def _prompt(self, job: Job) -> str:
        if isinstance(job.prompt, str):
            return job.prompt
        if job.prompt and isinstance(job.prompt[0], dict):
            return await self.apply_template([m for m in job.prompt if isinstance(m, dict)])
        return await self.detokenize([t for t in job.prompt if isinstance(t, int)])

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [BOS] * add_special + [ord(c) for c in text]

    async def detokenize(self, tokens: list[int]) -> str:
        if tokens == [666]:
            raise WorkerError("the model's process has died")
        return "".join(map(chr, tokens))

    async def apply_template(self, messages: list[dict[str, Any]]) -> str:
        if messages[0]["role"] == "tool":
            raise DataError("the model's chat template refuses a conversation: it begins with a tool")
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"

    async def close(self, deadline_s: float) -> None:
        self.closed_with = deadline_s
        self.ready = False
        end = time.monotonic() + deadline_s
        while self.alive and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.ended = True

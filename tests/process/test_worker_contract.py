"""The real worker, with the bundled model, keeps to the contract of workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import worker_contract as contract

from model.loaded_model import LoadOptions
from model.serving.worker.served_model import ModelOptions
from model.serving.worker.worker import ModelWorker

TIMEOUT_S = 240.0  # torch alone may take a minute to load on a busy machine


class Running:
    """A worker that is ready, and the loop that it lives on."""

    def __init__(self, gguf: Path) -> None:
        self.loop = asyncio.new_event_loop()
        options = ModelOptions(
            model_path=gguf,
            load=LoadOptions(n_threads=1, context_size=512, max_nodes=16),
            slots=3,
        )
        self.worker = ModelWorker(options, max_queue=16)
        self.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        self.worker.start()
        await asyncio.wait_for(self.worker.wait_ready(), TIMEOUT_S)

    def run(self, check: contract.Check) -> None:
        self.loop.run_until_complete(asyncio.wait_for(check(self.worker), TIMEOUT_S))

    def close(self) -> None:
        self.loop.run_until_complete(self.worker.close(0.0))
        self.loop.close()


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the process remembers out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def running(bundled_gguf: Path) -> Iterator[Running]:
    running = Running(bundled_gguf)
    yield running
    running.close()


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name_of)
def test_the_real_worker_keeps_the_contract(check: contract.Check, running: Running) -> None:
    running.run(check)


@pytest.mark.parametrize("check", contract.CLOSING_CHECKS, ids=contract.name_of)
def test_the_real_worker_closes_by_the_contract(check: contract.Check, bundled_gguf: Path) -> None:
    running = Running(bundled_gguf)
    try:
        running.run(check)
    finally:
        running.close()

"""The real server with the bundled model, under smaller shares of benchmarks/hardening.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.fuzz import bodies
from benchmarks.hardening import call, children, crowd, fuzz, kill_under_load, leave_at_once, vanish
from benchmarks.server_process import Server, server


@pytest.fixture(scope="module")
def running(bundled_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = str(tmp_path_factory.mktemp("cache"))
    few = {
        "N_THREADS": "1",
        "N_PARALLEL": "4",
        "MAX_QUEUE": "96",
        "MEDUSA_MAX_TOKENS_PER_STEP": "8",
    }
    with server(MODEL_PATH=str(bundled_gguf), XDG_CACHE_HOME=cache, **few) as running:
        yield running
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        asyncio.run(call(running.address, "GET", "/health"))


def test_senseless_bodies_are_the_clients_fault(running: Server) -> None:
    before = children(running.pid)
    result = asyncio.run(fuzz(running.address, 200))
    assert result["bad"] == [] and children(running.pid) == before
    assert (
        set(result["statuses"]) <= {200, 400, 413, 429}
        and min(result["statuses"][s] for s in (200, 400)) > 40
    )


def test_bodies_follow_from_the_seed_and_many_are_right() -> None:
    assert list(islice(bodies(3), 50)) == list(islice(bodies(3), 50)) != list(islice(bodies(4), 50))
    some = list(islice(bodies(0), 2000))
    assert len({body for _, body in some}) > 1500 and len({path for path, _ in some}) == 5


def test_clients_that_vanish_free_their_slots(running: Server) -> None:
    for result in (
        asyncio.run(leave_at_once(running.address, 60, 0.3)),
        asyncio.run(vanish(running.address, 60)),
    ):
        assert result["free_after_s"] < 10, result  # alone it takes a tenth of a second
    status, slots = asyncio.run(call(running.address, "GET", "/slots"))
    assert status == 200 and not any(slot["is_processing"] for slot in json.loads(slots))


def test_a_crowd_is_served_or_told_to_wait(running: Server) -> None:
    result = asyncio.run(crowd(running.address, 150, 2))
    assert set(result["statuses"]) == {"200", "429"} and sum(result["statuses"].values()) == 150
    assert result["statuses"]["200"] >= 96


def test_a_model_that_is_killed_is_back(running: Server) -> None:
    result = asyncio.run(kill_under_load(running.address, running.pid, 6))
    assert result["structured"] and result["another_process"] and result["generates_again"]
    assert set(result["statuses"]) <= {500, 503}

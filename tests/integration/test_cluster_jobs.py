"""`ray job submit` against a real Ray cluster on loopback: output, errors, exit codes come back."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

RAY = Path(sys.executable).with_name("ray")
START_TIMEOUT_S = 90
TOKEN = secrets.token_hex(16)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    """Whether a job server is there; one that wants a token is."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def environment() -> dict[str, str]:
    """This interpreter first on the path, no word of another Ray, a token of our own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    # Ray asks for a token by default, also on loopback; both sides read it from here.
    return {**env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the job server of a one-node cluster that lives as long as this module."""
    # All of its own: another Ray on the machine, as of a second test run, has the usual ones.
    port, dashboard, agent, agent_grpc = (free_port() for _ in range(4))
    log = tmp_path_factory.mktemp("ray_head") / "log"
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={agent_grpc}"]
    command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    with log.open("w") as sink:
        head = subprocess.Popen(
            command, stdout=sink, stderr=sink, env=environment(), cwd="/", start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(address):
            if head.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the Ray head did not come up:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it waits for daemons that ended with it
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def submit(address: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--address", address, "--working-dir", str(folder)]
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        done = subprocess.run(
            [*command, "--", "python", "-m", "cluster", *words],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=300,
            check=False,
        )
        # The job server answers a little before the node that runs jobs is there.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


@pytest.fixture(scope="module")
def travelling_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --working-dir sends: the packages, without what a checkout may have beside them."""
    folder = tmp_path_factory.mktemp("travelling")
    for package in ("schemas", "labeler", "trainer", "cluster"):
        (folder / package).symlink_to(ROOT / package)
    copy = tmp_path_factory.mktemp("copied") / "project"
    subprocess.run(["cp", "-rL", str(folder), str(copy)], check=True)
    return copy


def test_label_and_train_on_a_cluster(
    job_server: str, travelling_folder: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(6):
        (corpus / f"{index}.txt").write_text(" ".join(str(index * n) for n in range(40)))
    (travelling_folder / "label.toml").write_text(
        f'labels = "{tmp_path}/labels"\nview = "{tmp_path}/view"\n'
        f'[corpus]\npath = "{corpus}"\nformat = "text"\nglob = "*.txt"\n'
        "[text]\nmax_tokens = 128\noverlap = 16\n"
        f'[teacher]\nbackend = "transformers"\nmodel = "{tiny_model_dir}"\n'
    )
    done = submit(job_server, travelling_folder, "label", "label.toml", f"--json={tmp_path}/l.json")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "l.json").read_text())
    assert summary["rows_labelled"] == summary["rows_read"] > 0
    assert "rows" in done.stdout

    (travelling_folder / "train.toml").write_text(
        f'run = "{tmp_path}/student"\nview = "{tmp_path}/view"\n'
        f'[student]\npath = "{tiny_model_dir}"\n'
        "[data]\nmax_tokens = 128\nsequences_per_step = 2\nsteps = 3\n"
        "[ray]\nnum_workers = 2\n"
    )
    done = submit(job_server, travelling_folder, "train", "train.toml", f"--json={tmp_path}/t.json")
    assert done.returncode == 0, done.stdout + done.stderr
    trained = json.loads((tmp_path / "t.json").read_text())
    assert trained["steps"] == 3
    assert trained["world_size"] == 2


def test_errors_and_exit_code_reach_the_submitter(job_server: str, travelling_folder: Path) -> None:
    (travelling_folder / "broken.toml").write_text('labels = "x"\nlables = "y"\n')
    done = submit(job_server, travelling_folder, "label", "broken.toml")
    assert done.returncode != 0
    assert "lables" in done.stdout + done.stderr

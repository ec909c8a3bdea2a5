"""What the whole test session shares: one small model folder, one Ray instance."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import vllm_servers
from tests.support.tiny_model import make_model, make_tokenizer

# Before any library that reads them is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Clusters pass it on to their workers; see schemas.fault_points.
os.environ["TUTELAGE_FAULT_POINTS"] = tempfile.mkdtemp(prefix="tutelage-fault-points-")
atexit.register(shutil.rmtree, os.environ["TUTELAGE_FAULT_POINTS"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: Llama of 320 tokens, its tokenizer (bos 0, eos 1) and chat template."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tokenizer(folder)
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_server(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """URL and API key of a ``vllm serve`` of the tiny model, one for the whole session."""
    log = tmp_path_factory.mktemp("vllm_server") / "log.txt"
    with vllm_servers.vllm_server(tiny_model_dir, log) as url:
        yield url, vllm_servers.API_KEY


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray instance with two CPUs, shared by every test of the session."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    if started:
        ray.shutdown()

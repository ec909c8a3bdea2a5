"""The work of one teacher call: a unit of requests becomes one committed shard.

A unit is there when its manifest is, so a call that Ray repeats finds it and does nothing.
"""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labeler.assemble import assemble_rows
from labeler.requests import NOT_GENERATED, Request, key_of_unit
from labeler.teachers.base import RowFailure, RowLabels, Teacher
from schemas.keys import content_key, stack_keys
from schemas.label_set import LabelSet, QuarantineRow
from schemas.manifest import Manifest, manifest_path, read_manifest
from schemas.record import LabelRows
from schemas.spec import GenerationSpec, RecordSpec


@dataclass(frozen=True)
class UnitLabels:
    """What became of the requests of a unit; each is either labelled or quarantined.

    Attributes:
        requests: Those that are labelled.
        labels: Theirs, in order; None where the record is of kind ``tokens``.
        quarantined: The others.
    """

    requests: list[Request]
    labels: list[RowLabels] | None
    quarantined: list[QuarantineRow]

    def rows(self, record: RecordSpec) -> LabelRows | None:
        """The labelled rows in the stored form; None where there are none."""
        if not self.requests:
            return None
        token_ids = [request.token_ids for request in self.requests]
        spans = [request.label_spans for request in self.requests]
        content = [content_key(*pair) for pair in zip(token_ids, spans, strict=True)]
        return assemble_rows(
            stack_keys([request.row_key for request in self.requests]),
            stack_keys(content),
            token_ids,
            spans,
            self.labels,
            record,
        )


def label_requests(
    requests: Sequence[Request], teacher: Teacher, generation: GenerationSpec | None
) -> UnitLabels:
    """Labels requests; where they are prompts, generates their responses first.

    Raises:
        TeacherError: The engine failed, so that nothing can be said about single rows.
    """
    quarantined: list[QuarantineRow] = []
    complete = list(requests)
    if generation is not None:
        complete = _with_responses(requests, teacher, generation, quarantined)
    results = teacher.label(
        [request.token_ids for request in complete], [request.label_spans for request in complete]
    )
    good: list[Request] = []
    labels: list[RowLabels] = []
    for request, result in zip(complete, results, strict=True):
        if isinstance(result, RowFailure):
            quarantined.append(request.quarantined(result.reason, result.detail))
        else:
            good.append(request)
            labels.append(result)
    return UnitLabels(good, labels, quarantined)


def _with_responses(
    requests: Sequence[Request],
    teacher: Teacher,
    generation: GenerationSpec,
    quarantined: list[QuarantineRow],
) -> list[Request]:
    """Prompt and response of each request; what could not be generated goes to ``quarantined``."""
    by_prompt: dict[bytes, list[Request]] = {}
    for request in requests:
        assert request.sample != NOT_GENERATED
        by_prompt.setdefault(request.token_ids.tobytes(), []).append(request)
    by_count: dict[int, list[list[Request]]] = {}
    for samples in by_prompt.values():
        by_count.setdefault(len(samples), []).append(samples)
    complete = []
    for count, prompts in by_count.items():  # samples that are cached are not generated again
        results = teacher.generate(
            [samples[0].token_ids for samples in prompts],
            generation.model_copy(update={"n": count}),
            [[sample.seed() for sample in samples] for samples in prompts],
        )
        for samples, responses in zip(prompts, results, strict=True):
            if isinstance(responses, RowFailure):
                failed = (responses.reason, responses.detail)
                quarantined.extend(sample.quarantined(*failed) for sample in samples)
                continue
            for sample, response in zip(samples, responses, strict=True):
                if len(response):
                    complete.append(sample.with_response(response))
                else:
                    detail = "the teacher generated no token"
                    quarantined.append(sample.quarantined("empty_response", detail))
    return complete


@dataclass(frozen=True)
class UnitDone:
    """What a unit cost, for progress; what it holds is in its manifest."""

    unit_key: str
    num_rows: int
    num_tokens: int
    num_labels: int
    num_quarantined: int


class UnitLabeller:
    """Labels units into one label set.

    The teacher is made when the first unit comes that is not there yet, so that a run that has
    nothing to do starts no engine. Units may come from several threads; the teacher takes one call
    at a time.
    """

    def __init__(
        self,
        label_set: LabelSet,
        make_teacher: Callable[[], Teacher] | None,
        generation: GenerationSpec | None,
        salt: str = "",
    ) -> None:
        """Prepares.

        Args:
            label_set: Where units go.
            make_teacher: None for a set of kind ``tokens``.
            generation: How responses are generated, where requests are prompts.
            salt: See ``key_of_unit``.
        """
        self._label_set = label_set
        self._make_teacher = make_teacher
        self._generation = generation
        self._salt = salt
        self._teacher: Teacher | None = None
        self._lock = threading.Lock()

    def label(self, requests: Sequence[Request]) -> UnitDone:
        """Labels and commits one unit; if it is committed already, only says so.

        Raises:
            TeacherError: The teacher cannot be loaded, or its engine failed.
            StoreError: The label set cannot be written to.
        """
        unit_key = key_of_unit(requests, self._salt)
        store, path = self._label_set.store, manifest_path(unit_key)
        if store.exists(path):
            return _done(read_manifest(store, path, self._label_set.fingerprint))
        started = time.monotonic()
        if self._make_teacher is None:
            found = UnitLabels(list(requests), None, [])
            provenance: dict[str, object] = {"teacher_backend": "none"}
        else:
            teacher = self._loaded()
            found = label_requests(requests, teacher, self._generation)
            provenance = dict(teacher.provenance())
        provenance |= {"host": socket.gethostname(), "seconds": time.monotonic() - started}
        rows = found.rows(self._label_set.spec.record)
        return _done(self._label_set.commit_unit(rows, found.quarantined, provenance, unit_key))

    def _loaded(self) -> Teacher:
        with self._lock:
            if self._teacher is None:
                assert self._make_teacher is not None
                self._teacher = self._make_teacher()
            return self._teacher


def _done(manifest: Manifest) -> UnitDone:
    return UnitDone(
        manifest.unit_key,
        manifest.num_rows,
        manifest.num_tokens,
        manifest.num_labels,
        manifest.num_quarantined,
    )

"""Labels the requests of a unit: each is labelled, or quarantined with a reason."""

from collections.abc import Sequence
from dataclasses import dataclass

from labeler.corpus.requests import NOT_GENERATED, Request
from labeler.teachers.protocol import OnRow, RowLabels, Teacher
from labeler.units.assemble import assemble_rows
from labeler.units.unit_progress import UnitProgress
from schemas.errors import RowFailure
from schemas.keys import content_key, stack_keys
from schemas.label_set.label_set import QuarantineRow
from schemas.record import LabelRows
from schemas.spec import GenerationSpec, RecordSpec


@dataclass(frozen=True)
class UnitLabels:
    """The labelled and the quarantined requests of a unit.

    Attributes:
        requests: the labelled requests.
        labels: one per labelled request, in order; None for a record of kind ``tokens``.
        quarantined: the other requests.
    """

    requests: list[Request]
    labels: list[RowLabels] | None
    quarantined: list[QuarantineRow]

    def joined(self, other: "UnitLabels") -> "UnitLabels":
        """Concatenates two results; neither may be of kind ``tokens``."""
        labels = [*(self.labels or ()), *(other.labels or ())]
        return UnitLabels(
            self.requests + other.requests, labels, self.quarantined + other.quarantined
        )

    def refused(self, reason: str, detail: str) -> "UnitLabels":
        """Returns the unit with every labelled row quarantined."""
        refused = [request.quarantined(reason, detail) for request in self.requests]
        return UnitLabels([], [], [*self.quarantined, *refused])

    def rows(self, record: RecordSpec) -> LabelRows | None:
        """Returns the labelled rows in stored form, or None if no row is labelled."""
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
    requests: Sequence[Request],
    teacher: Teacher,
    generation: GenerationSpec | None,
    audit_rate: float = 0.0,
    progress: UnitProgress | None = None,
) -> UnitLabels:
    """Labels requests; for prompts, generates the responses first.

    Args:
        requests: one or more.
        teacher: may be shared with other calls.
        generation: how to sample responses; None: the requests are complete.
        audit_rate: fraction of the labels to audit.
        progress: counts the rows that the engine has finished.

    Raises:
        TeacherError: the engine failed, which says nothing about single rows.
    """
    progress = progress or UnitProgress()
    quarantined: list[QuarantineRow] = []
    complete = list(requests)
    if generation is not None:
        complete = _with_responses(requests, teacher, generation, quarantined, progress)
    results = teacher.label(
        [request.token_ids for request in complete],
        [request.label_spans for request in complete],
        stack_keys([request.row_key for request in complete]),
        audit_rate,
        lambda row: progress.labelled(complete[row]),
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
    progress: UnitProgress,
) -> list[Request]:
    """Completes prompts with responses; appends requests without one to ``quarantined``."""
    # Samples of a prompt are grouped so that the engine computes the prefix once.
    by_prompt: dict[bytes, list[Request]] = {}
    for request in requests:
        assert request.sample != NOT_GENERATED
        by_prompt.setdefault(request.token_ids.tobytes(), []).append(request)
    by_count: dict[int, list[list[Request]]] = {}
    for samples in by_prompt.values():
        by_count.setdefault(len(samples), []).append(samples)
    complete = []
    # Prompts may miss different numbers of samples, but each call has a single n.
    for count, prompts in by_count.items():
        results = teacher.generate(
            [samples[0].token_ids for samples in prompts],
            generation.model_copy(update={"n": count}),
            [[sample.seed() for sample in samples] for samples in prompts],
            _counting(prompts, progress),
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


def _counting(prompts: list[list[Request]], progress: UnitProgress) -> OnRow:
    """Counts the samples of each prompt as they finish, in any order."""
    waiting = [iter(samples) for samples in prompts]
    return lambda prompt: progress.generated(next(waiting[prompt]))

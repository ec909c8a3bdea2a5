"""Labels the requests of a unit: each is either labelled or quarantined with a reason."""

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
    """Outcome of the requests of a unit.

    Attributes:
        requests: the labelled ones.
        labels: one per labelled request, in order; None for a record of kind ``tokens``.
        quarantined: the others.
    """

    requests: list[Request]
    labels: list[RowLabels] | None
    quarantined: list[QuarantineRow]

    def joined(self, other: "UnitLabels") -> "UnitLabels":
        """Both together; both have labels."""
        labels = [*(self.labels or ()), *(other.labels or ())]
        return UnitLabels(
            self.requests + other.requests, labels, self.quarantined + other.quarantined
        )

    def refused(self, reason: str, detail: str) -> "UnitLabels":
        """The same unit with every labelled row in quarantine."""
        refused = [request.quarantined(reason, detail) for request in self.requests]
        return UnitLabels([], [], [*self.quarantined, *refused])

    def rows(self, record: RecordSpec) -> LabelRows | None:
        """The labelled rows in the stored form; None if there are none."""
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
    """Labels requests; if they are prompts, generates their responses first.

    Args:
        requests: one or more.
        teacher: may be shared with other calls.
        generation: None: the requests are complete.
        audit_rate: share of labels that are audited.
        progress: counts the rows that the engine has finished.

    Raises:
        TeacherError: the engine failed, so that nothing is known about single rows.
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
    """Prompt and response of each request; appends requests without response to ``quarantined``."""
    # One prompt with several seeds, so that the engine computes its prefix once.
    by_prompt: dict[bytes, list[Request]] = {}
    for request in requests:
        assert request.sample != NOT_GENERATED
        by_prompt.setdefault(request.token_ids.tobytes(), []).append(request)
    by_count: dict[int, list[list[Request]]] = {}
    for samples in by_prompt.values():
        by_count.setdefault(len(samples), []).append(samples)
    complete = []
    # Prompts differ in how many of their samples are missing, and one call has one n.
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
    """Counts the samples of each prompt as they finish, in whatever order."""
    waiting = [iter(samples) for samples in prompts]
    return lambda prompt: progress.generated(next(waiting[prompt]))

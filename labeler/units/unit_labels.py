"""What a teacher makes of the requests of a unit: labels, or a reason why not, for each."""

from collections.abc import Sequence
from dataclasses import dataclass

from labeler.corpus.requests import NOT_GENERATED, Request
from labeler.teachers.protocol import RowLabels, Teacher
from labeler.units.assemble import assemble_rows
from schemas.errors import RowFailure
from schemas.keys import content_key, stack_keys
from schemas.label_set.label_set import QuarantineRow
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

    def joined(self, other: "UnitLabels") -> "UnitLabels":
        """Both together; only of units with labels."""
        labels = [*(self.labels or ()), *(other.labels or ())]
        return UnitLabels(
            self.requests + other.requests, labels, self.quarantined + other.quarantined
        )

    def refused(self, reason: str, detail: str) -> "UnitLabels":
        """The same unit with every labelled row in quarantine."""
        refused = [request.quarantined(reason, detail) for request in self.requests]
        return UnitLabels([], [], [*self.quarantined, *refused])

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
    requests: Sequence[Request],
    teacher: Teacher,
    generation: GenerationSpec | None,
    audit_rate: float = 0.0,
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
        [request.token_ids for request in complete],
        [request.label_spans for request in complete],
        stack_keys([request.row_key for request in complete]),
        audit_rate,
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

"""How fast the real teacher labels, and how many bytes its labels take: a few units, thrown away.

The units go the whole way that a run's would, up to committed Parquet, but into a label set in a
temporary folder of the teacher's machine.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa

from labeler.config import LabelConfig, TeacherConfig
from labeler.corpus.requests import Request, from_table
from labeler.quality.gates import Gates
from labeler.run.unit_labeller import UnitDone, UnitLabeller
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import Survivor
from labeler.teachers.protocol import Teacher
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest, manifest_path
from schemas.spec import LabelSetSpec, RecordSpec
from schemas.storage.store import Store

WARM_ROWS = 8
"""Rows that are labelled first: engines compile and fill their caches over them."""

TIMED_S = 30.0
"""How long the timed units take together, about."""

_UNITS = 6
_CALLS = 3  # units at the same time, as in a run

MakeTeacher = Callable[[TeacherConfig, RecordSpec], Teacher]


@dataclass(frozen=True)
class Calibration:
    """What a teacher did with a few units.

    Attributes:
        start_s: Until it had labelled its first rows.
        seconds: Of the timed units together.
        timed_tokens: Of the timed units together, responses included.
        intervals_s: Between the ends of timed units.
        unit_labels, unit_bytes: Of each unit, timed or not: labels, and what it left on the disk.
        rows, tokens: Of all units, responses included.
        rows_bad: Rows that could not be labelled.
    """

    start_s: float
    seconds: float
    timed_tokens: int
    intervals_s: tuple[float, ...]
    unit_labels: tuple[int, ...]
    unit_bytes: tuple[int, ...]
    rows: int
    tokens: int
    rows_bad: int


class Calibrator:
    """A teacher and a temporary label set; runs as one Ray actor, with a replica's resources."""

    def __init__(self, config: LabelConfig, spec: LabelSetSpec, make_teacher: MakeTeacher) -> None:
        self._config = config
        self._spec = spec
        self._make_teacher = make_teacher

    def run(self, requests: pa.Table) -> Calibration:
        """Labels some of the requests.

        Args:
            requests: of ``labeler.corpus.requests.REQUEST_SCHEMA``, in random order; at least one.

        Raises:
            TeacherError: The teacher cannot be loaded or does not work.
        """
        with tempfile.TemporaryDirectory(prefix="tutelage-plan-") as folder:
            label_set = LabelSet.create_or_open(folder, self._spec)
            units = self._labeller(label_set)
            return _calibrate(units, label_set, from_table(requests), self._config.run.unit_tokens)

    def _labeller(self, label_set: LabelSet) -> UnitLabeller:
        config = self._config
        if config.teacher.backend == "none":
            return UnitLabeller(label_set, None)
        make = functools.partial(self._make_teacher, config.teacher, self._spec.record)
        attempts = Attempts(label_set.store, "plan")
        teacher = Survivor(make, attempts, config.generate, config.gates.audit_rate)
        gates = config.gates.model_copy(update={"parity_rows": 0})
        return UnitLabeller(label_set, teacher, "", Gates(label_set, gates, lambda: None))


def _calibrate(
    units: UnitLabeller, label_set: LabelSet, requests: list[Request], unit_tokens: int
) -> Calibration:
    first, rest = requests[:WARM_ROWS], requests[WARM_ROWS:]
    ends, start_s = _timed(units, [first])
    seconds = start_s  # of a corpus that has no more rows than these
    probe, rest = rest[: 2 * WARM_ROWS], rest[2 * WARM_ROWS :]
    if probe:
        ends, seconds = _timed(units, [probe])
        speed = ends[0][0].num_tokens / max(seconds, 1e-6)
        unit_tokens = min(unit_tokens, max(int(speed * TIMED_S / _UNITS), 1))
    timed = _cut(rest, unit_tokens)[:_UNITS]
    if timed:
        ends, seconds = _timed(units, timed)
    times = [0.0, *(end for _, end in ends)]
    manifests = label_set.manifests()
    return Calibration(
        start_s=start_s,
        seconds=seconds,
        timed_tokens=sum(done.num_tokens for done, _ in ends),
        intervals_s=tuple(end - start for start, end in pairwise(times)),
        unit_labels=tuple(manifest.num_labels for manifest in manifests),
        unit_bytes=tuple(unit_bytes(label_set.store, manifest) for manifest in manifests),
        rows=sum(manifest.num_rows for manifest in manifests),
        tokens=sum(manifest.num_tokens for manifest in manifests),
        rows_bad=sum(manifest.num_quarantined for manifest in manifests),
    )


def _timed(
    units: UnitLabeller, timed: Sequence[list[Request]]
) -> tuple[list[tuple[UnitDone, float]], float]:
    """Each unit and when it ended, by that; and how long all took, in seconds."""
    started = time.monotonic()

    def label(requests: list[Request]) -> tuple[UnitDone, float]:
        return units.label(requests), time.monotonic() - started

    with ThreadPoolExecutor(_CALLS) as pool:
        ends = sorted(pool.map(label, timed), key=lambda end: end[1])
    return ends, time.monotonic() - started


def unit_bytes(store: Store, manifest: Manifest) -> int:
    """What a unit takes in its label set: data, keys and manifest."""
    files = (manifest.shard, manifest.keys, manifest_path(manifest.unit_key))
    return sum(store.size(rel) for rel in files if rel)


def _cut(requests: list[Request], unit_tokens: int) -> list[list[Request]]:
    """Units of at least so many tokens; a smaller rest is left out."""
    units: list[list[Request]] = []
    unit: list[Request] = []
    size = 0
    for request in requests:
        unit.append(request)
        size += len(request.token_ids)
        if size >= unit_tokens:
            units.append(unit)
            unit, size = [], 0
    return units or ([unit] if unit else [])

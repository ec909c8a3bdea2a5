"""Measures the throughput of the real teacher and the bytes of its labels.

A few units take the same path as in a run, up to committed Parquet, but into a label set in a
temporary folder on the teacher's machine.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from labeler.config import LabelConfig, TeacherConfig
from labeler.corpus.requests import from_table
from labeler.quality.gates import Gates
from labeler.run.actors.unit_labeler import UnitLabeler
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.teachers.protocol import Teacher
from labeler.units.sizing import cut_units
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest, manifest_path
from schemas.spec import LabelSetSpec, RecordSpec
from schemas.storage.store import Store

WARM_ROWS = 8
"""Warm-up rows, untimed: engines compile and fill their caches on them."""

TIMED_S = 30.0
"""Approximate total seconds of the timed units."""

_TIMED_UNITS = 6
_CALLS = 3  # concurrent units, as in a run

MakeTeacher = Callable[[TeacherConfig, RecordSpec], Teacher]


@dataclass(frozen=True)
class Calibration:
    """Measurements of a teacher on a few units.

    Attributes:
        start_s: seconds until the first rows were labelled.
        tokens_per_s: end-to-end throughput, responses included.
        rows, tokens, labels: counts of the timed units, responses included.
        size_bytes: bytes of the timed units in the label set: data, keys and manifests.
    """

    start_s: float = 0.0
    tokens_per_s: float = 0.0
    rows: int = 0
    tokens: int = 0
    labels: int = 0
    size_bytes: int = 0


class Calibrator:
    """A teacher and a temporary label set; runs as one Ray actor with the resources of a replica.

    ``progress`` may be called while ``run`` is running.
    """

    def __init__(self, config: LabelConfig, spec: LabelSetSpec, make_teacher: MakeTeacher) -> None:
        self._config = config
        self._spec = spec
        self._make_teacher = make_teacher
        self._rows_total = 0
        self._rows_done: dict[str, tuple[int, int]] = {}

    def progress(self) -> tuple[int, int, int]:
        """Returns finished rows, rows of all units so far, and finished tokens."""
        rows, tokens = map(sum, zip((0, 0), *self._rows_done.values(), strict=True))
        return rows, self._rows_total, tokens

    def run(self, requests: pa.Table) -> Calibration:
        """Labels some of the requests.

        Args:
            requests: table of ``labeler.corpus.requests.REQUEST_SCHEMA``, shuffled; not empty.

        Raises:
            TeacherError: the teacher cannot be loaded or does not work.
        """
        generation = self._config.generate
        generated_tokens = 0 if generation is None else generation.max_tokens
        with tempfile.TemporaryDirectory(prefix="tutelage-plan-") as folder:
            label_set = LabelSet.create_or_open(folder, self._spec)
            units = self._make_labeler(label_set)
            warm, probe, rest = (
                requests.slice(start, length)
                for start, length in (
                    (0, WARM_ROWS),
                    (WARM_ROWS, 2 * WARM_ROWS),
                    (3 * WARM_ROWS, None),
                )
            )
            done, start_s = self._label(units, [warm])
            seconds = start_s  # used if the corpus has no further rows
            if probe.num_rows:
                done, seconds = self._label(units, [probe])
            if rest.num_rows:
                # Units of the run's size, unless these would take too long here.
                in_time = int(_tokens_per_s(done, seconds) * TIMED_S / _TIMED_UNITS)
                unit_tokens = max(1, min(self._config.run.unit_tokens, in_time))
                timed = cut_units(rest, unit_tokens, generated_tokens)[:_TIMED_UNITS]
                done, seconds = self._label(units, timed)
            return Calibration(
                start_s=start_s,
                tokens_per_s=_tokens_per_s(done, seconds),
                rows=sum(unit.num_rows for unit in done),
                tokens=sum(unit.num_tokens for unit in done),
                labels=sum(unit.num_labels for unit in done),
                size_bytes=sum(unit_bytes(label_set.store, unit) for unit in done),
            )

    def _make_labeler(self, label_set: LabelSet) -> UnitLabeler:
        config = self._config
        if config.teacher.backend == "none":
            return UnitLabeler(label_set, None)
        teacher = EngineSupervisor(
            functools.partial(self._make_teacher, config.teacher, self._spec.record),
            Attempts(label_set.store, "plan"),
            config.generate,
            config.gates.audit_rate,
        )
        gates_config = config.gates.model_copy(update={"parity_rows": 0})
        gates = Gates(label_set, gates_config, lambda: None)
        return UnitLabeler(label_set, teacher, gates=gates, report=self._report)

    def _report(self, unit_key: str, rows: int, tokens: int, _: int) -> None:
        self._rows_done[unit_key] = rows, tokens

    def _label(
        self, units: UnitLabeler, tables: Sequence[pa.Table]
    ) -> tuple[list[Manifest], float]:
        """Labels units concurrently; returns their manifests and the total seconds."""
        self._rows_total += sum(table.num_rows for table in tables)
        started = time.monotonic()

        def label(table: pa.Table) -> Manifest:
            unit = units.label(from_table(table))
            self._report(unit.unit_key, table.num_rows, unit.num_tokens, 0)
            return unit

        with ThreadPoolExecutor(_CALLS) as pool:
            done = list(pool.map(label, tables))
        return done, time.monotonic() - started


def _tokens_per_s(units: Sequence[Manifest], seconds: float) -> float:
    return sum(unit.num_tokens for unit in units) / max(seconds, 1e-6)


def unit_bytes(store: Store, manifest: Manifest) -> int:
    """Bytes of a unit in its label set: data, keys and manifest."""
    files = (manifest.shard, manifest.keys, manifest_path(manifest.unit_key))
    return sum(store.size(rel) for rel in files if rel)

"""Measurements on one engine: the child processes of `benchmarks.label`.

A process can hold only one engine, and compared runs must share a process: prefill, the stock
paths, ours and the floor take turns, so that a slow phase of the machine affects all of them.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.demo_labels import TokenRows
from benchmarks.label_cases import (
    K,
    make_folder,
    make_label_set,
    make_requests,
    make_rows,
    records,
    teacher_config,
)
from benchmarks.label_floor import floor_seconds
from benchmarks.label_profile import profile_us
from labeler.config import GatesConfig
from labeler.quality.gates import Gates
from labeler.run.actors.unit_labeler import UnitLabeler
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.teacher_model.identity import load_model_config
from labeler.teachers.protocol import RowLabels
from labeler.teachers.vllm.teacher import VllmTeacher, engine_request
from schemas.errors import RowFailure
from schemas.spec import RecordSpec

_CALLS = 3
"""Units in flight, as in a label job's teacher actor."""

_GATES = GatesConfig(parity_rows=0)
"""Audits as in any job, but no parity check, which runs once per label set, not per unit."""


def measure_engine(
    model: str, num_tokens: int, row_tokens: int, unit_rows: int, repeats: int
) -> tuple[dict[str, Any], TokenRows, dict[str, list[RowLabels]], int]:
    """Figures of one model, its rows, their labels by record, and its vocabulary size."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = teacher_config(make_folder(model, folder / "model"))
        shape = load_model_config(config).get_text_config()
        rows = make_rows(model, num_tokens, row_tokens, shape.vocab_size)
        teacher = VllmTeacher(config, next(iter(records(model).values())))
        engine = EngineBenchmark(teacher, rows, folder, unit_rows)
        figures = engine.measure(records(model), repeats, shape.hidden_size)
        labels = {kind: engine.labels(record) for kind, record in records(model).items()}
        teacher.close()
    return figures, rows, labels, shape.vocab_size


class EngineBenchmark:
    """An engine with one model, rows to label, and the ways to run them."""

    def __init__(self, teacher: VllmTeacher, rows: TokenRows, folder: Path, unit_rows: int) -> None:
        self.teacher = teacher
        self.rows = rows
        self.folder = folder
        self.unit_rows = unit_rows

    def measure(
        self, kinds: dict[str, RecordSpec], repeats: int, hidden_size: int
    ) -> dict[str, Any]:
        """Medians over repeats in which all ways take turns.

        Ratios are computed within each repeat, then their median is taken.
        """
        ways: dict[str, Callable[[], float]] = {
            "plain": self._prefill,
            "stock_flat": functools.partial(self._prefill, flat=True),
            "stock_dict": functools.partial(self._prefill, flat=False),
            "floor": functools.partial(self._floor, hidden_size),
        }
        ours: dict[str, Callable[[], float]] = {
            kind: functools.partial(self._ours, record) for kind, record in kinds.items()
        }
        for warm_up in (ways["plain"], *ours.values()):  # the first step of each kind is slow
            warm_up()
        found: dict[str, list[float]] = {name: [] for name in (*ways, *ours)}
        for _ in range(repeats):
            for name, run in (ways | ours).items():
                found[name].append(run())
        seconds = {name: np.array(values) for name, values in found.items()}
        num_tokens = sum(map(len, self.rows.token_ids))
        plain, floor = seconds["plain"], seconds["floor"]
        return {
            "num_tokens": num_tokens,
            "plain_tokens_per_s": num_tokens / median(plain),
            "stock_tokens_per_s": {
                form: num_tokens / median(seconds[f"stock_{form}"]) for form in ("flat", "dict")
            },
            "limit": float(np.median(plain / (plain + floor))),
            "floor_us_per_token": 1e6 * median(floor) / num_tokens,
            "records": {
                kind: {
                    "labelled_tokens_per_s": num_tokens / median(seconds[kind]),
                    "efficiency": float(np.median(plain / seconds[kind])),
                    "efficiency_over_limit": float(np.median((plain + floor) / seconds[kind])),
                    "profile_us": profile_us(self.teacher, run, num_tokens),
                }
                for kind, run in ours.items()
            },
            "seconds": found,
            "provenance": self.teacher.provenance(),
        }

    def labels(self, record: RecordSpec) -> list[RowLabels]:
        """Labels all rows, without rounding."""
        self._use_record(record)
        rows = self.rows
        results = self.teacher.label(rows.token_ids, rows.label_spans, rows.row_keys)
        labels = [one for one in results if isinstance(one, RowLabels)]
        assert len(labels) == len(results)
        return labels

    def _use_record(self, record: RecordSpec) -> None:
        """Switches the record in place, because starting a new engine takes long."""
        self.teacher._record = record
        self.teacher._engine.alone(self.teacher._install_label_path)

    def _prefill(self, flat: bool | None = None) -> float:
        """Seconds of prefill: plain (None), or with K candidates, flat or as dictionaries."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=True,
            prompt_logprobs=None if flat is None else K,
            flat_logprobs=bool(flat),
        )
        # Drives the engine as the teacher does, on the thread that owns its cores.
        started = time.perf_counter()
        requests = [engine_request(tokens, params) for tokens in self.rows.token_ids]
        outputs = self.teacher._engine.outputs(requests)
        seconds = time.perf_counter() - started
        assert not any(isinstance(output, RowFailure) for output in outputs)
        return seconds

    def _ours(self, record: RecordSpec) -> float:
        """Seconds from requests to the last manifest."""
        self._use_record(record)
        requests: Sequence[Any] = make_requests(self.rows)
        starts = range(0, len(requests), self.unit_rows)
        batches = [requests[first : first + self.unit_rows] for first in starts]
        with TemporaryDirectory(dir=self.folder) as folder, ThreadPoolExecutor(_CALLS) as pool:
            label_set = make_label_set(folder, record, self.teacher._limits.vocab_size)
            attempts = Attempts(label_set.store, "benchmark")
            supervisor = EngineSupervisor(lambda: self.teacher, attempts, None, _GATES.audit_rate)
            gates = Gates(label_set, _GATES, lambda: None)
            units = UnitLabeler(label_set, supervisor, gates=gates)
            started = time.perf_counter()
            done = list(pool.map(units.label, batches))
            seconds = time.perf_counter() - started
        assert not sum(unit.num_quarantined for unit in done)
        return seconds

    def _floor(self, hidden_size: int) -> float:
        """Seconds that no labeller can avoid; see `label_floor`."""
        floor = functools.partial(
            floor_seconds, num_labels=self.rows.num_labels, hidden_size=hidden_size
        )
        return max(self.teacher._engine.alone(self.teacher._llm.apply_model, floor))

"""What labels cost the host between the engine and the manifest, on arrays that were kept."""

import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.demo_labels import TokenRows
from benchmarks.label_units import make_label_set, make_requests
from labeler.corpus.requests import requests_unit_key
from labeler.label_head.position_labels import PositionLabels
from labeler.teachers.protocol import RowLabels
from labeler.teachers.vllm.packed_labels import Packed, pack, unpack
from labeler.units.unit_labels import UnitLabels
from schemas.record import LabelRows
from schemas.record.validate import validate
from schemas.spec import RecordSpec

_NOT_AUDITED = np.zeros(0, np.int64)


def host_us_per_label(
    rows: TokenRows,
    labels: Sequence[RowLabels],
    record: RecordSpec,
    vocab_size: int,
    unit_rows: int,
    repeats: int,
) -> dict[str, float]:
    """Microseconds of CPU time a label, all threads counted, the least of some repeats.

    Args:
        rows: that were labelled.
        labels: theirs, as the teacher gave them; they are packed as the engine ships them.
        record: of the labels.
        vocab_size: V.
        unit_rows: rows of a unit.
        repeats: how often everything is done.

    Returns:
        ``total``; and of it ``assemble`` (unpacking the arrays, rounding them, putting them
        together) and ``commit`` (checking the rows, and writing shard, keys and manifest), of which
        checking is ``validate``.
    """
    requests, packed = make_requests(rows), [_packed(one, record) for one in labels]
    parts: dict[str, list[float]] = {"assemble": [], "commit": [], "validate": []}
    for _ in range(repeats):
        spent = dict.fromkeys(parts, 0.0)
        with tempfile.TemporaryDirectory() as folder:
            label_set = make_label_set(folder, record, vocab_size)
            for first in range(0, len(requests), unit_rows):
                unit = slice(first, first + unit_rows)

                def assemble(unit: slice = unit) -> LabelRows:
                    unpacked = [unpack(one, record, _NOT_AUDITED) for one in packed[unit]]
                    assembled = UnitLabels(requests[unit], unpacked, []).rows(record)
                    assert assembled is not None
                    return assembled

                key = requests_unit_key(requests[unit])
                spent["assemble"] += _cpu_s(assemble)
                stored = assemble()
                spent["commit"] += _cpu_s(lambda: label_set.commit_unit(stored, [], {}, key))  # noqa: B023
                spent["validate"] += _cpu_s(lambda: validate(stored, record, vocab_size))  # noqa: B023
        for name, seconds in spent.items():
            parts[name].append(1e6 * seconds / rows.num_labels)
    least = {name: min(values) for name, values in parts.items()}
    totals = zip(parts["assemble"], parts["commit"], strict=True)
    return {"total": min(map(sum, totals)), **least}


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _packed(labels: RowLabels, record: RecordSpec) -> Packed:
    """The arrays that the engine shipped for a row; its audits are left out."""

    def tensor(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(np.ascontiguousarray(values))

    return pack(PositionLabels(*map(tensor, labels.columns())), record)

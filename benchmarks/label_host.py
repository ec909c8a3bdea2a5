"""CPU time on the host, from the engine's arrays to the manifest."""

import tempfile
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.demo_labels import TokenRows
from benchmarks.harness import timed
from benchmarks.label_cases import make_label_set, make_requests
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
    """Microseconds of CPU time per label, over all threads, in the fastest of several repeats.

    Args:
        rows: the labelled rows.
        labels: labels of the rows, as returned by the teacher; packed as the engine does.
        record: record of the labels.
        vocab_size: V.
        unit_rows: rows per unit.
        repeats: number of repeats.

    Returns:
        ``total``, and its parts ``assemble`` (unpacking the arrays, rounding them, joining rows),
        ``validate`` and ``write`` (shard, keys and manifest).
    """
    requests, packed = make_requests(rows), [_packed(one, record) for one in labels]
    found = []
    for _ in range(repeats):
        spent = dict.fromkeys(("total", "assemble", "validate", "write"), 0.0)
        with tempfile.TemporaryDirectory() as folder:
            label_set = make_label_set(folder, record, vocab_size)
            for first in range(0, len(requests), unit_rows):
                unit = slice(first, first + unit_rows)

                def assemble(unit: slice = unit) -> LabelRows:
                    unpacked = [unpack(one, record, _NOT_AUDITED) for one in packed[unit]]
                    assembled = UnitLabels(requests[unit], unpacked, []).rows(record)
                    assert assembled is not None
                    return assembled

                stored, key = assemble(), requests_unit_key(requests[unit])
                seconds = {
                    "assemble": timed(assemble).cpu_s,
                    "commit": timed(lambda: label_set.commit_unit(stored, [], {}, key)).cpu_s,  # noqa: B023
                    "validate": timed(lambda: validate(stored, record, vocab_size)).cpu_s,  # noqa: B023
                }
                spent["total"] += seconds["assemble"] + seconds["commit"]
                spent["assemble"] += seconds["assemble"]
                spent["validate"] += seconds["validate"]
                spent["write"] += seconds["commit"] - seconds["validate"]  # a commit validates
        found.append(spent)
    fastest = min(found, key=lambda spent: spent["total"])
    return {name: 1e6 * seconds / rows.num_labels for name, seconds in fastest.items()}


def _packed(labels: RowLabels, record: RecordSpec) -> Packed:
    """Packs a row's labels as the engine does, without audits."""

    def tensor(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(np.ascontiguousarray(values))

    return pack(PositionLabels(*map(tensor, labels.columns())), record)

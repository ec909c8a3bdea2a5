"""Progress inside a unit: at most once a second, no row twice, and no error for the engine."""

import numpy as np

from labeler.corpus.requests import Request
from labeler.units.unit_progress import UnitProgress


def request(number: int) -> Request:
    none = np.empty(0, np.int32)
    return Request(bytes([number] * 16), np.zeros(5, np.int32), none, "a", number)


def test_counts_are_reported_once_a_second_and_each_row_once() -> None:
    now = [0.0]
    reports: list[tuple[int, ...]] = []
    progress = UnitProgress(lambda *counts: reports.append(counts), clock=lambda: now[0])
    progress.generated(request(0))
    progress.labelled(request(0))
    assert reports == []
    for now[0] in (1.0, 1.5, 2.0):
        progress.labelled(request(1))  # retried after a crash
    assert reports == [(2, 10, 1), (2, 10, 1)]


def test_errors_of_a_report_stay_out_of_the_engine() -> None:
    now = [0.0]

    def fail(*_: int) -> None:
        raise RuntimeError("the ledger is gone")

    progress = UnitProgress(fail, clock=lambda: now[0])
    now[0] = 5.0
    progress.labelled(request(0))

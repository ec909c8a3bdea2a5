"""Progress inside one unit: rows that the engine has finished while the unit is in work."""

import contextlib
import time
from collections.abc import Callable

from labeler.corpus.requests import Request

REPORT_INTERVAL_S = 1.0

ReportProgress = Callable[[int, int, int], object]
"""Called with the rows, the tokens and the responses that the engine has finished of a unit."""


def ignore_progress(*_: object) -> None:
    """A ``ReportProgress`` for callers that show no progress."""


class UnitProgress:
    """Counts what the engine has finished of one unit, and reports it at most once a second.

    For people only: a row that is counted here may still be quarantined or labelled again. Rows
    are counted by key, so that a row that is retried after a crash counts once.
    """

    def __init__(
        self,
        report: ReportProgress = ignore_progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            report: where the counts go; its errors are ignored.
            clock: seconds from any origin.
        """
        self._report, self._clock = report, clock
        self._reported_at = clock()
        self._tokens: dict[bytes, int] = {}
        self._generated: set[bytes] = set()

    def labelled(self, request: Request) -> None:
        """Counts a row whose labels have left the engine."""
        self._tokens[request.row_key] = len(request.token_ids)
        self._report_if_due()

    def generated(self, request: Request) -> None:
        """Counts a response that is sampled and still has to be labelled."""
        self._generated.add(request.row_key)
        self._report_if_due()

    def _report_if_due(self) -> None:
        now = self._clock()
        if now - self._reported_at < REPORT_INTERVAL_S:
            return
        self._reported_at = now
        # Called on the engine's thread, where an error would end the engine.
        with contextlib.suppress(Exception):
            self._report(len(self._tokens), sum(self._tokens.values()), len(self._generated))

"""Progress of one in-flight unit: the rows that the engine has finished so far."""

import contextlib
import time
from collections.abc import Callable

from labeler.corpus.requests import Request

REPORT_INTERVAL_S = 1.0

ReportProgress = Callable[[int, int, int], object]
"""Called with the counts of finished rows, tokens and responses of a unit."""


def ignore_progress(*_: object) -> None:
    """A ``ReportProgress`` for callers that show no progress."""


class UnitProgress:
    """Counts the finished rows of one unit, and reports them at most once a second.

    For display only: a counted row may still be quarantined or labelled again. Rows are counted by
    key, so a row retried after a crash counts once.
    """

    def __init__(
        self,
        report: ReportProgress = ignore_progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            report: called with the counts; its errors are ignored.
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
        """Counts a sampled response that is not labelled yet."""
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

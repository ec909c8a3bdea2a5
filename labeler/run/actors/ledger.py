"""The ledger of a run: which corpus piece owns each row, and the progress of the run.

Several pieces may hold the same row: the first piece to claim its key sends it to the teacher, the
others count it as a duplicate. The ledger remembers the owner of each claim, so claims are
idempotent when Ray retries a tokenising task.

It lives in one process and takes about 150 bytes per distinct row, enough for 10^8 rows per run.
"""

import time

import numpy as np
import numpy.typing as npt

from labeler.run.actors.run_state import RunState
from schemas.keys import Keys

PARITY_CLAIM_S = 1800.0
"""Seconds that other teachers wait for the one checking parity, which may have crashed."""


class Ledger:
    """Answers claims and collects progress; runs as one Ray actor."""

    def __init__(self, bytes_total: int) -> None:
        self._owner: dict[bytes, int] = {}
        self._bytes_total = bytes_total
        self._bytes_read: dict[int, int] = {}  # by piece
        self._units: dict[str, tuple[int, int, int]] = {}  # unit -> rows, tokens, generated
        self._committed: set[str] = set()
        self._is_stopping = False
        self._lines: list[str] = []
        self._is_teacher_up = False
        self._parity_claim: tuple[str, float] | None = None

    def claim(self, piece: int, keys: Keys) -> tuple[npt.NDArray[np.bool_], bool]:
        """Claims rows for a piece.

        Args:
            piece: index of the piece.
            keys: uint8 [R, 16], without duplicates.

        Returns:
            bool [R]: whether the piece owns each row, possibly from an earlier attempt of its task;
            and whether the run is stopping.
        """
        owner = self._owner
        claimed = [owner.setdefault(key.tobytes(), piece) == piece for key in keys]
        return np.array(claimed, bool), self._is_stopping

    def stop(self) -> None:
        """Tells tasks and teachers to start no new work."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        """Whether new work must not start."""
        return self._is_stopping

    def note(self, text: str) -> None:
        """Queues a line for the driver to show."""
        self._lines.append(text)

    def teacher_up(self, teacher: str) -> None:
        """Records that a teacher actor has (re)started, which ends its parity claim."""
        self._is_teacher_up = True
        self.release_parity_check(teacher)

    def claim_parity_check(self, teacher: str) -> bool:
        """Whether this teacher now holds the exclusive right to run the parity check.

        Calling it again renews the claim. If the holder crashes, others wait until it restarts, but
        at most ``PARITY_CLAIM_S``.
        """
        now = time.monotonic()
        if self._parity_claim is not None:
            holder, since = self._parity_claim
            if holder != teacher and now - since < PARITY_CLAIM_S:
                return False
        self._parity_claim = teacher, now
        return True

    def release_parity_check(self, teacher: str) -> None:
        """Releases the claim of this teacher, whatever the outcome of the check."""
        if self._parity_claim is not None and self._parity_claim[0] == teacher:
            self._parity_claim = None

    def piece_read(self, piece: int, size_bytes: int) -> None:
        """Records that a piece was fully read; idempotent."""
        self._bytes_read[piece] = size_bytes

    def unit_progress(self, unit_key: str, rows: int, tokens: int, generated: int) -> None:
        """Records the progress of an in-flight unit."""
        if unit_key not in self._committed:  # calls of other threads may arrive late
            self._units[unit_key] = (rows, tokens, generated)

    def unit_done(self, unit_key: str, rows: int, tokens: int) -> None:
        """Records a committed unit, replacing its progress; idempotent."""
        self._committed.add(unit_key)
        generated = self._units.get(unit_key, (0, 0, 0))[2]
        self._units[unit_key] = (rows, tokens, generated)

    def report(self) -> tuple[RunState, list[str]]:
        """Returns the progress of the run, and the lines queued since the last call.

        For display only: the accounts of a run come from its roster and manifests.
        """
        lines, self._lines = self._lines, []
        rows, tokens, generated = map(sum, zip((0, 0, 0), *self._units.values(), strict=True))
        state = RunState(
            bytes_read=sum(self._bytes_read.values()),
            bytes_total=self._bytes_total,
            rows_found=len(self._owner),
            rows_done=rows,
            tokens_done=tokens,
            num_generated=generated,
            is_teacher_up=self._is_teacher_up,
        )
        return state, lines

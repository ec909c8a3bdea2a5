"""The ledger of a run: which piece of the corpus claimed a row first, and how far reading has come.

Two pieces may hold the same row; the one that claims its key first sends it to the teacher, the
others count it as a duplicate. A claim is remembered with the piece that made it, so that a
tokenising task that Ray runs a second time gets the same answers as the first time.

One process holds it, at about 150 bytes a distinct row: good for 10^8 rows of a run.
"""

import time

import numpy as np
import numpy.typing as npt

from labeler.run.progress import RunState
from labeler.run.unit_labeller import UnitDone
from schemas.keys import Keys

PARITY_CLAIM_S = 1800.0
"""How long all wait for a teacher that compares its labels with a reference and may be dead."""


class Ledger:
    """Answers claims and counts for progress; runs as one Ray actor."""

    def __init__(self, bytes_total: int) -> None:
        self._owner: dict[bytes, int] = {}
        self._bytes_total = bytes_total
        self._read: dict[int, tuple[int, int]] = {}
        self._done: dict[str, UnitDone] = {}
        self._stopping = False
        self._news: list[str] = []
        self._is_up = False
        self._checking: tuple[str, float] | None = None

    def claim(self, piece: int, keys: Keys) -> npt.NDArray[np.bool_]:
        """Claims rows for a piece.

        Args:
            piece: Index of the piece.
            keys: uint8 [R, 16], each once.

        Returns:
            bool [R]: whether the row is this piece's, now or from an earlier run of its task.
        """
        owner = self._owner
        claimed = [owner.setdefault(key.tobytes(), piece) == piece for key in keys]
        return np.array(claimed, bool)

    def stop(self) -> None:
        """Nothing that has not begun is to begin."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether nothing is to begin any more."""
        return self._stopping

    def note(self, text: str) -> None:
        """Keeps a line for the people who watch the run."""
        self._news.append(text)

    def news(self) -> list[str]:
        """The lines since this was asked last."""
        news, self._news = self._news, []
        return news

    def teacher_up(self, teacher: str) -> None:
        """Notes that a teacher actor has come up, or again; what it was doing before is over."""
        self._is_up = True
        self.checked(teacher)

    def has_teachers(self) -> bool:
        """Whether any teacher actor has come up."""
        return self._is_up

    def may_check(self, teacher: str) -> bool:
        """Whether this teacher, and no other, may now compare its labels with a reference.

        It claims that until it says ``checked``; asking again renews the claim. One that died is
        waited for until it is up again, and not beyond a certain time.
        """
        now = time.monotonic()
        if self._checking is not None:
            holder, since = self._checking
            if holder != teacher and now - since < PARITY_CLAIM_S:
                return False
        self._checking = teacher, now
        return True

    def checked(self, teacher: str) -> None:
        """Gives back what ``may_check`` claimed, however the comparison ended."""
        if self._checking is not None and self._checking[0] == teacher:
            self._checking = None

    def piece_read(self, piece: int, size_bytes: int, rows_sent: int) -> None:
        """Notes that a piece was read to its end; saying it again changes nothing."""
        self._read[piece] = (size_bytes, rows_sent)

    def unit_done(self, done: UnitDone) -> None:
        """Notes a committed unit; saying it again changes nothing."""
        self._done[done.unit_key] = done

    def state(self) -> RunState:
        """How far the run is, for people to look at; accounts have other sources."""
        done = self._done.values()
        return RunState(
            bytes_read=sum(size for size, _ in self._read.values()),
            bytes_total=self._bytes_total,
            rows_sent=sum(sent for _, sent in self._read.values()),
            rows_done=sum(unit.num_rows + unit.num_quarantined for unit in done),
            tokens_done=sum(unit.num_tokens for unit in done),
            labels_done=sum(unit.num_labels for unit in done),
        )

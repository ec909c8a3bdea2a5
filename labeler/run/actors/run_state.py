"""The progress of a labelling run, and its display."""

from dataclasses import dataclass

from schemas.console.progress import Progress


@dataclass(frozen=True)
class RunState:
    """The progress of a run, as seen by its ledger.

    Attributes:
        bytes_read, bytes_total: corpus bytes; a piece counts once it is fully read.
        rows_found: rows found so far that this run must label.
        rows_done: the part of these already labelled or quarantined, including in-flight units.
        tokens_done: tokens in the rows that are done.
        num_generated: responses sampled so far.
        is_teacher_up: a teacher actor has started.
    """

    bytes_read: int
    bytes_total: int
    rows_found: int
    rows_done: int
    tokens_done: int
    num_generated: int = 0
    is_teacher_up: bool = False

    def share_done(self) -> float:
        """Estimates the completed share of all work, in [0, 1].

        Assumes that the unread part of the corpus holds rows at the same rate.
        """
        read = self.bytes_read / self.bytes_total if self.bytes_total else 1.0
        # Capped: if Ray retries a task, its rows may land in other units and count twice.
        labelled = min(self.rows_done / self.rows_found, 1.0) if self.rows_found else 1.0
        return min(read * labelled, 1.0)

    def show(self, progress: Progress) -> None:
        """Shows rows, share of the corpus, tokens per second and time left."""
        what, facts = f"labelled {self.rows_done:,} of {self.rows_found:,} rows", []
        if self.bytes_read < self.bytes_total:
            what += " found"
            facts.append(f"corpus read {100 * self.bytes_read / self.bytes_total:.0f}%")
        if self.num_generated:
            facts.append(f"{self.num_generated:,} responses generated")
        progress.show(self.share_done(), 1.0, what, tokens=self.tokens_done, facts=facts)

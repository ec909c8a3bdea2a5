"""How far a labelling run is, and the line that shows it."""

from dataclasses import dataclass

from schemas.console.progress import Progress


@dataclass(frozen=True)
class RunState:
    """How far a run is, as its ledger knows it.

    Attributes:
        bytes_read, bytes_total: of the corpus; a piece counts once it is read to its end.
        rows_found: rows found so far that this run has to label.
        rows_done: of these, labelled or quarantined, those of unfinished units included.
        tokens_done: in the rows that are done.
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
        """Estimated share of all work that is done, in [0, 1].

        The part of the corpus that is still unread is assumed to hold rows at the same rate.
        """
        read = self.bytes_read / self.bytes_total if self.bytes_total else 1.0
        # Capped: if Ray repeats a task, its rows may be cut into other units and count twice.
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

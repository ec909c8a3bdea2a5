"""Constants of a run and the first steps of each of its processes."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from labeler.config import LabelConfig, TeacherConfig
from labeler.run.replicas import make_replica
from labeler.teachers.protocol import Teacher
from schemas.spec import RecordSpec
from schemas.storage.retry import RetryPolicy, set_retry_policy


@dataclass(frozen=True, eq=False)
class RunSetup:
    """The constants of a run.

    Attributes:
        run: identity of the run.
        config: with paths that mean the same in every process.
        make_teacher: loads the teacher, in its actor.
    """

    run: str
    config: LabelConfig
    make_teacher: Callable[[TeacherConfig, RecordSpec], Teacher] = make_replica

    @property
    def salt(self) -> str:
        """Part of the unit keys where quarantined rows are retried; see ``requests_unit_key``."""
        return self.run if self.config.run.retry_quarantined else ""

    # By run only: worker processes cache by it, and a configuration with dicts has no hash.
    def __hash__(self) -> int:
        return hash(self.run)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunSetup) and other.run == self.run


def say_line(ledger: Any, text: str) -> None:
    """Has the driver show a line; the standard error of this process only goes to Ray's logs."""
    print(text, file=sys.stderr, flush=True)
    ledger.note.remote(text)


def retry_stores(setup: RunSetup, ledger: Any) -> None:
    """Has this process retry stores for as long as the run allows, and the driver show it."""
    report = functools.partial(say_line, ledger)
    set_retry_policy(RetryPolicy(setup.config.run.store_patience_s, report))

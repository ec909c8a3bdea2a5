"""Constants of a run and the first steps of each of its processes."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from labeler.config import LabelConfig, TeacherConfig
from labeler.run.ray_cluster.replicas import make_replica
from labeler.teachers.protocol import Teacher
from schemas.spec import RecordSpec
from schemas.storage.retry import RetryPolicy, set_retry_policy


@dataclass(frozen=True)
class RunSetup:
    """The constants of a run; equal and hashed by ``run`` alone, so that caches can be keyed by it.

    Attributes:
        run: identity of the run.
        config: with paths that mean the same in every process.
        make_teacher: loads the teacher, in its actor.
    """

    run: str
    config: LabelConfig = field(compare=False)
    make_teacher: Callable[[TeacherConfig, RecordSpec], Teacher] = field(
        default=make_replica, compare=False
    )

    @property
    def salt(self) -> str:
        """Part of the unit keys where quarantined rows are retried; see ``requests_unit_key``."""
        return self.run if self.config.run.retry_quarantined else ""


def say_line(ledger: Any, text: str) -> None:
    """Has the driver show a line; the standard error of this process only goes to Ray's logs."""
    print(text, file=sys.stderr, flush=True)
    ledger.note.remote(text)


def retry_stores(setup: RunSetup, ledger: Any) -> None:
    """Has this process retry stores for as long as the run allows, and the driver show it."""
    report = functools.partial(say_line, ledger)
    set_retry_policy(RetryPolicy(setup.config.run.store_patience_s, report))

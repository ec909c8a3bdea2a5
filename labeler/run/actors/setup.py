"""The constants of a run and the setup of each of its processes."""

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
    """The constants of a run; compared and hashed by ``run`` alone, so that it can be a cache key.

    Attributes:
        run: run id.
        config: configuration with paths that are valid in every process.
        make_teacher: loads the teacher inside its actor.
    """

    run: str
    config: LabelConfig = field(compare=False)
    make_teacher: Callable[[TeacherConfig, RecordSpec], Teacher] = field(
        default=make_replica, compare=False
    )

    @property
    def salt(self) -> str:
        """Salt of the unit keys; empty unless quarantined rows are retried."""
        return self.run if self.config.run.retry_quarantined else ""


def say_line(ledger: Any, text: str) -> None:
    """Shows a line through the driver, because a worker's stderr only reaches Ray's logs."""
    print(text, file=sys.stderr, flush=True)
    ledger.note.remote(text)


def retry_stores(setup: RunSetup, ledger: Any) -> None:
    """Sets the store retry policy of this process and reports retries through the driver."""
    report = functools.partial(say_line, ledger)
    set_retry_policy(RetryPolicy(setup.config.run.store_patience_s, report))

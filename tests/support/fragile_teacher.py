"""Teachers whose engine dies on a certain token, and requests for them."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from labeler.corpus.requests import Request, label_request
from labeler.corpus.windows import all_but_first
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row
from labeler.units.unit_labels import UnitLabels
from schemas.errors import RowFailure, TeacherError
from schemas.spec import GenerationSpec
from schemas.storage.store import Store

POISON = 666
REFUSED = 13


class FragileTeacher:
    """Its engine dies on a certain token, with an error or with the process."""

    shareable = False
    started = 0

    def __init__(self, crash: bool = False, canary_dies: bool = False) -> None:
        type(self).started += 1
        self._crash = crash
        self._canary_dies = canary_dies

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        if any(POISON in ids for ids in token_ids) or (self._canary_dies and len(token_ids) == 1):
            if self._crash:
                os._exit(11)
            raise TeacherError("the engine died")
        return [
            RowFailure("refused", "") if REFUSED in ids else zero_labels(len(ids))
            for ids in token_ids
        ]

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        raise AssertionError("nothing is generated here")

    def provenance(self) -> dict[str, object]:
        return {}

    def close(self) -> None:
        raise RuntimeError("an engine that died does not close")


def zero_labels(count: int) -> RowLabels:
    zeros = np.zeros(count, np.float32)
    return RowLabels(
        entry_ids=np.zeros((count, 1), np.int32),
        entry_logprobs=zeros[:, None],
        head_len=np.ones(count, np.int32),
        tail_len=np.zeros(count, np.int32),
        entry_counts=None,
        tail_logmass=zeros,
        target_logprob=zeros,
        target_rank=np.ones(count, np.int32),
        entropy=None,
        lse=None,
    )


def requests(tokens: list[int]) -> list[Request]:
    return [
        label_request(np.array([token, token], np.int32), all_but_first(2), "a", place, 0)
        for place, token in enumerate(tokens)
    ]


def supervisor(folder: Path, run: str = "run", **teacher: bool) -> EngineSupervisor:
    FragileTeacher.started = 0
    attempts = Attempts(Store(str(folder)), run)
    return EngineSupervisor(lambda: FragileTeacher(**teacher), attempts, None)


class SharedTeacher(FragileTeacher):
    """A multi-threaded engine: on a certain token, it dies for all requests in flight."""

    shareable = True

    def __init__(self, expected: int = 1, crash: bool = False) -> None:
        super().__init__()
        # After a crash, units arrive one at a time, so a long wait would be in vain.
        self._wait_s = 0.3 if crash else 30.0
        self.most_together = 0
        self._expected = expected
        self._crash = crash
        self._in_flight = 0
        self._poisoned = False
        self._changed = threading.Condition()

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        with self._changed:
            self._in_flight += 1
            self._poisoned |= any(POISON in ids for ids in token_ids)
            self.most_together = max(self.most_together, self._in_flight)
            self._changed.notify_all()
            # The first calls wait for each other, so that they are in flight together.
            self._changed.wait_for(lambda: self.most_together >= self._expected, self._wait_s)
            if self._poisoned and self._crash:
                os._exit(11)
            self._in_flight -= 1
            if self._poisoned:
                raise TeacherError("the engine died")
        return [zero_labels(len(ids)) for ids in token_ids]


def units(tokens: Sequence[Sequence[int]]) -> list[list[Request]]:
    """Requests of several units; a token stands for its row."""
    rows = iter(requests([token for unit in tokens for token in unit]))
    return [[next(rows) for _ in unit] for unit in tokens]


def label_all(supervisor: EngineSupervisor, batches: list[list[Request]]) -> list[UnitLabels]:
    with ThreadPoolExecutor(len(batches)) as pool:
        return [found for found, _ in pool.map(supervisor.label, batches)]

"""Labels a unit of requests and commits it as one shard.

Idempotent: a unit is committed once its manifest exists, so a call that Ray retries does nothing.
"""

import functools
import socket
import time
from collections.abc import Callable, Sequence

from labeler.corpus.requests import Request, requests_unit_key
from labeler.quality.gates import Gates
from labeler.supervision.supervisor import EngineSupervisor
from labeler.units.unit_labels import UnitLabels
from labeler.units.unit_progress import UnitProgress, ignore_progress
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest, manifest_path, read_manifest


class UnitLabeler:
    """Labels units into one label set. Thread-safe."""

    def __init__(
        self,
        label_set: LabelSet,
        teacher: EngineSupervisor | None,
        salt: str = "",
        gates: Gates | None = None,
        report: Callable[[str, int, int, int], object] = ignore_progress,
    ) -> None:
        """
        Args:
            label_set: where units are committed.
            teacher: None for a set of kind ``tokens``.
            salt: see ``requests_unit_key``.
            gates: checks before a commit; None: no checks.
            report: called with the key and the counts of an in-flight unit; see ``ReportProgress``.
        """
        self._label_set = label_set
        self._teacher = teacher
        self._salt = salt
        self._gates = gates
        self._report = report

    def label(self, requests: Sequence[Request]) -> Manifest:
        """Labels and commits one unit unless it is already committed; returns its manifest.

        Raises:
            TeacherError: the teacher cannot be loaded, its engine is broken, or its labels differ
                from those of another implementation.
            StoreError: the label set cannot be written to.
        """
        unit_key = requests_unit_key(requests, self._salt)
        store, path = self._label_set.store, manifest_path(unit_key)
        if store.exists(path):
            return read_manifest(store, path, self._label_set.fingerprint)
        started = time.monotonic()
        unit_labels, provenance = UnitLabels(list(requests), None, []), dict[str, object]()
        if self._teacher is not None:
            progress = UnitProgress(functools.partial(self._report, unit_key))
            unit_labels, provenance = self._teacher.label(requests, progress)
        provenance |= {"host": socket.gethostname(), "seconds": time.monotonic() - started}
        rows = unit_labels.rows(self._label_set.spec.record)
        fidelity = None
        if self._gates is not None:
            self._gates.check_parity(unit_labels)
            fidelity, problem = self._gates.audit(unit_labels, rows)
            if problem:  # the bound is on the unit's mean, so none of its rows can be trusted
                unit_labels, rows = unit_labels.refused("fidelity", problem), None
        quarantined = unit_labels.quarantined
        return self._label_set.commit_unit(rows, quarantined, provenance, unit_key, fidelity)

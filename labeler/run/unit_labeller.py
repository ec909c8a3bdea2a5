"""The work of one teacher call: a unit of requests becomes one committed shard.

A unit is there when its manifest is, so a call that Ray repeats finds it and does nothing.
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from labeler.corpus.requests import Request, requests_unit_key
from labeler.quality.gates import Gates
from labeler.supervision.supervisor import Survivor
from labeler.units.unit_labels import UnitLabels
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest, manifest_path, read_manifest


@dataclass(frozen=True)
class UnitDone:
    """What a unit cost, for progress; what it holds is in its manifest."""

    unit_key: str
    num_rows: int
    num_tokens: int
    num_labels: int
    num_quarantined: int


class UnitLabeller:
    """Labels units into one label set; units may come from several threads."""

    def __init__(
        self,
        label_set: LabelSet,
        teacher: Survivor | None,
        salt: str = "",
        gates: Gates | None = None,
    ) -> None:
        """Prepares.

        Args:
            label_set: Where units go.
            teacher: None for a set of kind ``tokens``.
            salt: See ``requests_unit_key``.
            gates: What labels pass before they are committed; None: nothing.
        """
        self._label_set = label_set
        self._teacher = teacher
        self._salt = salt
        self._gates = gates

    def label(self, requests: Sequence[Request]) -> UnitDone:
        """Labels and commits one unit; if it is committed already, only says so.

        Raises:
            TeacherError: The teacher cannot be loaded, its engine is broken, or its labels are not
                those of another implementation.
            StoreError: The label set cannot be written to.
        """
        unit_key = requests_unit_key(requests, self._salt)
        store, path = self._label_set.store, manifest_path(unit_key)
        if store.exists(path):
            return _done(read_manifest(store, path, self._label_set.fingerprint))
        started = time.monotonic()
        found, provenance = UnitLabels(list(requests), None, []), dict[str, object]()
        if self._teacher is not None:
            found, provenance = self._teacher.label(requests)
        provenance |= {"host": socket.gethostname(), "seconds": time.monotonic() - started}
        rows = found.rows(self._label_set.spec.record)
        fidelity = None
        if self._gates is not None:
            self._gates.check_parity(found)
            fidelity, problem = self._gates.audit(found, rows)
            if problem:
                found, rows = found.refused("fidelity", problem), None
        return _done(
            self._label_set.commit_unit(rows, found.quarantined, provenance, unit_key, fidelity)
        )


def _done(manifest: Manifest) -> UnitDone:
    return UnitDone(
        manifest.unit_key,
        manifest.num_rows,
        manifest.num_tokens,
        manifest.num_labels,
        manifest.num_quarantined,
    )

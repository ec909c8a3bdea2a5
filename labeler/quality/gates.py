"""Quality gates before a unit is committed; a unit that fails its audit is quarantined."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from labeler.config import GatesConfig
from labeler.quality.fidelity import measure
from labeler.quality.parity import Reference, check_parity
from labeler.units.unit_labels import UnitLabels
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Fidelity
from schemas.label_set.parity_result import PARITY_FILE
from schemas.record import LabelRows

MakeReference = Callable[[], Reference | None]
Claim = Callable[[], AbstractContextManager[bool]]

_POLL_S = 1.0


def _claim_unshared() -> AbstractContextManager[bool]:
    return nullcontext(True)


class Gates:
    """The gates of one label set within one process."""

    def __init__(
        self,
        label_set: LabelSet,
        config: GatesConfig,
        make_reference: MakeReference,
        claim: Claim = _claim_unshared,
    ) -> None:
        """
        Args:
            label_set: where units are committed.
            config: the bounds.
            make_reference: returns a second implementation of the teacher, or None if no
                independent one is available.
            claim: context manager that yields True if this process has the exclusive right to
                check parity.
        """
        self._label_set = label_set
        self._config = config
        self._make_reference = make_reference
        self._claim = claim
        self._is_checked = config.parity_rows == 0
        self._checking = threading.Lock()

    def check_parity(self, unit_labels: UnitLabels) -> None:
        """Checks once per label set that another implementation gives the same labels.

        Raises:
            TeacherError: the labels differ; nothing may be published.
        """
        if self._is_checked or not unit_labels.labels:
            return
        # One at a time: the reference may be as large as the teacher.
        with self._checking:
            while not self._is_checked:
                with self._claim() as is_mine:
                    self._is_checked = self._label_set.store.exists(PARITY_FILE)
                    if is_mine and not self._is_checked:
                        reference = self._make_reference()
                        if reference is not None:
                            check_parity(self._label_set, self._config, reference, unit_labels)
                        self._is_checked = True
                if not self._is_checked:
                    time.sleep(_POLL_S)

    def audit(self, unit_labels: UnitLabels, rows: LabelRows | None) -> tuple[Fidelity | None, str]:
        """Compares the audited labels, in stored form, with the full distribution.

        Returns:
            The result, or None if nothing was audited; and the reason for refusing the unit, empty
            if it may be published.
        """
        if rows is None or not unit_labels.labels:
            return None, ""
        fidelity = measure(unit_labels.labels, rows, self._label_set.spec.record)
        if fidelity is None:
            return None, ""
        # Written so that a NaN fails.
        if not fidelity.mean_kl <= self._config.max_kl:
            return fidelity, (
                f"storing the labels costs {fidelity.mean_kl:.2e} nats per label, "
                f"gates.max_kl allows {self._config.max_kl:.0e}"
            )
        if not fidelity.missed_mass <= self._config.max_missed_mass:
            return fidelity, (
                f"a head misses {fidelity.missed_mass:.2e} of the most probable ids' mass, "
                f"gates.max_missed_mass allows {self._config.max_missed_mass:.0e}"
            )
        return fidelity, ""

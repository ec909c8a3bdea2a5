"""What a unit's labels pass before they are committed; a unit that fails is kept from everyone."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from labeler.config import GatesConfig
from labeler.corpus.requests import Request
from labeler.quality.fidelity import measure
from labeler.quality.parity import Reference, check_parity
from labeler.teachers.protocol import RowLabels
from labeler.units.unit_labels import UnitLabels
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Fidelity
from schemas.label_set.parity_result import PARITY_FILE
from schemas.record import LabelRows

MakeReference = Callable[[], Reference | None]
Claim = Callable[[], AbstractContextManager[bool]]

_POLL_S = 1.0


def _unshared() -> AbstractContextManager[bool]:
    return nullcontext(True)


class Gates:
    """The gates of one label set, in one process."""

    def __init__(
        self,
        label_set: LabelSet,
        config: GatesConfig,
        make_reference: MakeReference,
        claim: Claim = _unshared,
    ) -> None:
        """Prepares.

        Args:
            label_set: where units go.
            config: the bounds.
            make_reference: a second implementation of the teacher; None where the teacher is it.
            claim: tells whether this process is the one that may compare labels with the reference,
                for as long as the context is open; of the others none may meanwhile.
        """
        self._label_set = label_set
        self._config = config
        self._make_reference = make_reference
        self._claim = claim
        self._parity_known = config.parity_rows == 0
        self._checking = threading.Lock()

    def check_parity(self, found: UnitLabels) -> None:
        """Once per label set: the teacher's labels are those of another implementation.

        Raises:
            TeacherError: They are not, so nothing may be published.
        """
        if self._parity_known or not found.labels:
            return
        # The reference may be as large as the teacher: there is room for one, and one is enough.
        with self._checking:
            while not self._parity_known:
                with self._claim() as is_mine:
                    self._parity_known = self._label_set.store.exists(PARITY_FILE)
                    if is_mine and not self._parity_known:
                        self._compare(found.requests, found.labels)
                        self._parity_known = True
                if not self._parity_known:
                    time.sleep(_POLL_S)

    def _compare(self, requests: list[Request], labels: list[RowLabels]) -> None:
        reference = self._make_reference()
        if reference is not None:
            check_parity(
                self._label_set.store,
                self._label_set.spec,
                self._config,
                reference,
                requests,
                labels,
            )

    def audit(self, found: UnitLabels, rows: LabelRows | None) -> tuple[Fidelity | None, str]:
        """Compares the audited labels, as they would be stored, with the full distribution.

        Returns:
            What was found, None where nothing was audited; and what is wrong with it, empty where
            the unit may be published.
        """
        if rows is None or not found.labels:
            return None, ""
        fidelity = measure(found.labels, rows, self._label_set.spec.record)
        if fidelity is None:
            return None, ""
        if not fidelity.mean_kl <= self._config.max_kl:
            return fidelity, (
                f"storing the labels costs {fidelity.mean_kl:.2e} nats a label, "
                f"gates.max_kl allows {self._config.max_kl:.0e}"
            )
        if not fidelity.missed_mass <= self._config.max_missed_mass:
            return fidelity, (
                f"a head misses {fidelity.missed_mass:.2e} of the most probable ids' mass, "
                f"gates.max_missed_mass allows {self._config.max_missed_mass:.0e}"
            )
        return fidelity, ""

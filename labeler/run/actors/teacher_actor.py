"""The Ray actor that runs one teacher: each call labels and commits one unit."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from labeler.corpus.requests import from_table
from labeler.quality.gates import Gates
from labeler.quality.reference_teacher import choose_reference
from labeler.run.actors.setup import RunSetup, retry_stores, say_line
from labeler.run.actors.unit_labeler import UnitLabeler
from labeler.run.ray_cluster.ray_session import is_lost_node, this_actor, this_node, was_restarted
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.supervision.watchdog import Watchdog
from labeler.units.sizing import UNIT_SCHEMA, unwrapped
from schemas.label_set.label_set import LabelSet


class TeacherActor:
    """Labels units with one teacher; Ray calls it from several threads."""

    def __init__(self, setup: RunSetup, ledger: Any) -> None:
        self._ledger = ledger
        # First, because the driver waits for it while stores and the teacher may respond slowly.
        ledger.teacher_up.remote(this_actor())
        retry_stores(setup, ledger)
        if was_restarted():
            say_line(ledger, "a teacher process crashed and was restarted; see Ray's logs for why")
        label_set = LabelSet.open(setup.config.labels)
        teacher, gates = None, None
        if setup.config.teacher.backend != "none":
            teacher, gates = _gated_teacher(setup, ledger, label_set)
        report = ledger.unit_progress.remote
        self._units = UnitLabeler(label_set, teacher, setup.salt, gates, report)

    def __call__(self, units: pa.Table) -> pa.Table:
        """Labels and commits units; returns an empty table: the manifests hold the results."""
        import ray

        for requests in unwrapped(units):
            if ray.get(self._ledger.is_stopping.remote()):
                break
            unit = self._units.label(from_table(requests))
            num_rows = unit.num_rows + unit.num_quarantined
            # Wait, so that the final state shown by the driver includes this unit.
            ray.get(self._ledger.unit_done.remote(unit.unit_key, num_rows, unit.num_tokens))
        return UNIT_SCHEMA.empty_table()


def _gated_teacher(
    setup: RunSetup, ledger: Any, label_set: LabelSet
) -> tuple[EngineSupervisor, Gates]:
    config = setup.config
    # The record of the label set, which may be richer than the requested one.
    make = functools.partial(setup.make_teacher, config.teacher, label_set.spec.record)
    actor = this_actor()
    teacher = EngineSupervisor(
        make,
        Attempts(label_set.store, setup.run, this_node(), is_lost_node, actor),
        config.generate,
        config.gates.audit_rate,
        Watchdog(config.run.stall_s),
        functools.partial(say_line, ledger),
    )
    reference = functools.partial(choose_reference, config.teacher, teacher.run_exclusively)
    claim = functools.partial(_parity_claim, ledger, actor)
    return teacher, Gates(label_set, config.gates, reference, claim)


@contextmanager
def _parity_claim(ledger: Any, actor: str) -> Iterator[bool]:
    import ray

    is_mine = ray.get(ledger.claim_parity_check.remote(actor))
    try:
        yield is_mine
    finally:
        if is_mine:
            ledger.release_parity_check.remote(actor)

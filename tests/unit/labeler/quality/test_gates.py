"""Gates: a unit that storing has damaged and a teacher that disagrees with a reference."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from labeler.config import GatesConfig, TeacherConfig
from labeler.corpus.requests import Request, label_request
from labeler.corpus.windows import all_but_first
from labeler.quality.gates import Claim, Gates
from labeler.quality.parity import Reference
from labeler.quality.reference_teacher import choose_reference, stock_path, transformers_on_cpu
from labeler.run.actors.ledger import PARITY_CLAIM_S, Ledger
from labeler.run.actors.unit_labeler import UnitLabeler
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.teachers.protocol import RowLabels
from labeler.teachers.transformers_teacher import TransformersTeacher
from labeler.units.unit_labels import UnitLabels
from schemas.errors import RowFailure, TeacherError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.parity_result import PARITY_FILE
from schemas.spec import LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec

RECORD = RecordSpec(kind="threshold", tau=0.05)


def make_label_set(folder: Path, record: RecordSpec) -> LabelSet:
    spec = LabelSetSpec(
        record=record,
        teacher=TeacherIdentity(
            weights_digest="w", tokenizer_digest="t", vocab_size=320, dtype="float32"
        ),
        text=TextSpec(max_tokens=64, overlap=8, add_bos=False, add_eos=False, split_long=True),
    )
    return LabelSet.create_or_open(str(folder), spec)


def make_requests(count: int) -> list[Request]:
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 320, 40, dtype=np.int32) for _ in range(count)]
    return [label_request(ids, all_but_first(40), "file", n, 0) for n, ids in enumerate(rows)]


def config_of(model: Path) -> TeacherConfig:
    return TeacherConfig(
        backend="transformers", model=str(model), dtype="float32", max_model_len=64
    )


def labeller(
    tmp_path: Path,
    model: Path,
    gates: GatesConfig,
    record: RecordSpec = RECORD,
    reference: Reference | None = None,
) -> tuple[UnitLabeler, LabelSet]:
    label_set = make_label_set(tmp_path / "labels", record)
    supervisor = EngineSupervisor(
        lambda: TransformersTeacher(config_of(model), record),
        Attempts(label_set.store, "run", "here", lambda _: False),
        None,
        gates.audit_rate,
    )
    return (
        UnitLabeler(label_set, supervisor, gates=Gates(label_set, gates, lambda: reference)),
        label_set,
    )


def test_manifest_has_what_the_audit_found(tmp_path: Path, tiny_model_dir: Path) -> None:
    units, label_set = labeller(tmp_path, tiny_model_dir, GatesConfig(audit_rate=0.1))
    units.label(make_requests(4))
    (manifest,) = label_set.manifests()
    assert manifest.fidelity is not None
    assert 12 <= manifest.fidelity.labels <= 20
    assert manifest.fidelity.mean_kl < 1e-5
    assert 0.0 < manifest.fidelity.covered_mass <= 1.0


def test_gate_refuses_a_unit_that_lost_too_much(tmp_path: Path, tiny_model_dir: Path) -> None:
    coarse = RECORD.model_copy(update={"logprob_bits": 1})
    gates = GatesConfig(audit_rate=1.0, max_kl=1e-5)
    units, label_set = labeller(tmp_path, tiny_model_dir, gates, coarse)
    done = units.label(make_requests(3))
    assert (done.num_rows, done.num_quarantined) == (0, 3)
    assert len(label_set.index()) == 0
    row = label_set.quarantine().to_pylist()[0]
    assert row["reason"] == "fidelity"
    assert "nats per label, gates.max_kl allows 1e-05" in row["detail"]


def test_parity_with_the_reference_is_noted_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    reference = transformers_on_cpu(config_of(tiny_model_dir))
    gates = GatesConfig(parity_rows=2, parity_tokens=16)
    units, label_set = labeller(tmp_path, tiny_model_dir, gates, reference=reference)
    units.label(make_requests(4))
    noted = json.loads(label_set.store.read_bytes(PARITY_FILE))
    assert noted["reference"].startswith("transformers ")
    assert (noted["rows"], noted["labels"]) == (2, 32)
    assert abs(noted["mean_kl"]) < 1e-6
    assert noted["max_logprob_difference"] < 1e-4
    before = label_set.store.read_bytes(PARITY_FILE)
    units, _ = labeller(tmp_path, tiny_model_dir, gates, reference=reference)
    units.label(make_requests(8))
    assert label_set.store.read_bytes(PARITY_FILE) == before


def test_parity_accepts_a_head_of_all_ids(tmp_path: Path, tiny_model_dir: Path) -> None:
    everything = RecordSpec(kind="topk", k=320)
    reference = transformers_on_cpu(config_of(tiny_model_dir))
    gates = GatesConfig(audit_rate=0.5)
    units, label_set = labeller(tmp_path, tiny_model_dir, gates, everything, reference)
    units.label(make_requests(4))
    (manifest,) = label_set.manifests()
    assert manifest.num_rows == 4


def test_parity_refuses_drift_and_says_by_how_much(tmp_path: Path, tiny_model_dir: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 0.05  # as an engine that reads a setting in another way
    (other / "config.json").write_text(json.dumps(config))
    units, label_set = labeller(
        tmp_path, tiny_model_dir, GatesConfig(), reference=transformers_on_cpu(config_of(other))
    )
    with pytest.raises(TeacherError, match=r"KL \d\.\d+e-\d+ nats per label on .* at most 1e-04"):
        units.label(make_requests(4))
    assert label_set.manifests() == []
    assert not label_set.store.exists(PARITY_FILE)


def test_parity_needs_no_reference_of_the_reference(tiny_model_dir: Path) -> None:
    def never(_: object) -> list[np.ndarray | RowFailure]:
        raise AssertionError("not needed")

    assert choose_reference(config_of(tiny_model_dir), never) is None
    other = config_of(tiny_model_dir).model_copy(update={"backend": "other"})
    with pytest.raises(TeacherError, match="no parity reference is defined"):
        choose_reference(other, never)


class Comparisons:
    """Stands for ``check_parity``: counts comparisons that are made, and that at the same time."""

    def __init__(self, failing: int = 0) -> None:
        self.made = self.together = self.most_together = 0
        self._failing = failing
        self._lock = threading.Lock()

    def __call__(self, label_set: LabelSet, *_: object) -> None:
        with self._lock:
            self.made += 1
            self.together += 1
            self.most_together = max(self.most_together, self.together)
            fails = self.made <= self._failing
        time.sleep(0.2)
        with self._lock:
            self.together -= 1
        if fails:
            raise TeacherError("the comparison failed")
        label_set.store.create_exclusive(PARITY_FILE, b"{}")


UNIT = UnitLabels(make_requests(1), [cast(RowLabels, object())], [])


def gates_of(folder: Path, claim: Claim | None = None) -> Gates:
    reference = cast(Reference, object())
    label_set = make_label_set(folder, RECORD)
    more = {} if claim is None else {"claim": claim}
    return Gates(label_set, GatesConfig(), lambda: reference, **more)


def claims(ledger: Ledger, name: str) -> Claim:
    """As teacher actors claim, whose calls a ledger gets one after another."""
    one_by_one = threading.Lock()

    @contextmanager
    def claim() -> Iterator[bool]:
        with one_by_one:
            is_mine = ledger.claim_parity_check(name)
        try:
            yield is_mine
        finally:
            ledger.release_parity_check(name)

    return claim


def test_parity_compares_once_for_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparisons = Comparisons()
    monkeypatch.setattr("labeler.quality.gates.check_parity", comparisons)
    gates = gates_of(tmp_path)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(gates.check_parity, [UNIT] * 3))
    assert comparisons.made == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_parity_compares_replicas_one_by_one(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the one that claimed it fails, the next one does it."""
    comparisons = Comparisons(failing)
    monkeypatch.setattr("labeler.quality.gates.check_parity", comparisons)
    monkeypatch.setattr("labeler.quality.gates._POLL_S", 0.01)
    ledger = Ledger(bytes_total=0)
    replicas = [gates_of(tmp_path, claims(ledger, f"replica-{n}")) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(gates.check_parity, UNIT) for gates in replicas]
    assert sum(isinstance(one.exception(), TeacherError) for one in done) == failing
    assert comparisons.made == 1 + failing
    assert comparisons.most_together == 1


def test_parity_without_reference_blocks_nobody(tmp_path: Path) -> None:
    ledger = Ledger(bytes_total=0)
    label_set = make_label_set(tmp_path, RECORD)
    for name in ("a", "b"):
        Gates(label_set, GatesConfig(), lambda: None, claims(ledger, name)).check_parity(UNIT)
    assert not label_set.store.exists(PARITY_FILE)


def test_parity_claim_of_a_dead_replica_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("labeler.run.actors.ledger.time.monotonic", lambda: now[0])
    ledger = Ledger(bytes_total=0)
    assert ledger.claim_parity_check("dead")
    assert not ledger.claim_parity_check("other")
    assert ledger.claim_parity_check("dead")  # it was restarted
    ledger.release_parity_check("other")  # changes nothing
    assert not ledger.claim_parity_check("other")
    now[0] = PARITY_CLAIM_S
    assert ledger.claim_parity_check("other")
    ledger.release_parity_check("dead")  # it was only slow
    assert not ledger.claim_parity_check("dead")


def test_parity_takes_a_refused_row_for_no_crash() -> None:
    stock = stock_path(
        lambda _: [RowFailure("too_long", "9 tokens")], "transformers cannot load it"
    )
    with pytest.raises(TeacherError, match=r"own path \(transformers .* refuses a row: 9 tokens"):
        stock.logprobs([], [], [])

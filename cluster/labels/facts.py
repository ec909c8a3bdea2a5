"""Formats facts on a label set, from spec, manifests and rosters, for `show` and `report`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schemas.console.text import size_text
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.label_set.parity_result import read_parity
from schemas.label_set.roster import Accounts, finished_runs, read_accounts
from schemas.maintenance.listing import record_text, teacher_text

RUN_COLUMNS = ("run", "read", "labelled", "reused", "duplicate", "quarantined", "reasons")


def label_set_facts(label_set: LabelSet) -> list[tuple[str, str]]:
    """Name and text of each fact."""
    manifests = label_set.manifests()
    labels = sum(manifest.num_labels for manifest in manifests)
    size = sum(manifest.size_bytes for manifest in manifests)
    spec = label_set.spec
    seconds = sum(float(m.provenance.get("seconds", 0.0)) for m in manifests)
    backends = {str(m.provenance["backend"]) for m in manifests if "backend" in m.provenance}
    facts = [
        ("label set", f"{label_set.url} (fingerprint {label_set.fingerprint})"),
        ("record", record_text(spec.record)),
        ("columns", ", ".join(spec.record.columns)),
        ("teacher", teacher_text(label_set, manifests)),
        ("weights", spec.teacher.weights_digest or "none"),
        ("numerics", f"{spec.teacher.dtype}, head {spec.teacher.head_dtype}"),
        ("backend", ", ".join(sorted(backends)) or "not recorded"),
        ("vocabulary", f"{spec.teacher.vocab_size:,} ids"),
        ("text", ", ".join(f"{name}={value}" for name, value in spec.text)),
        ("units", f"{len(manifests):,}, {seconds:,.0f} s of teacher time"),
        ("rows", f"{sum(m.num_rows for m in manifests):,}"),
        ("tokens", f"{sum(m.num_tokens for m in manifests):,}"),
        ("labels", f"{labels:,}"),
        ("quarantined", f"{len(label_set.quarantine()):,}"),
        ("size", f"{size_text(size)}, {size / labels if labels else 0:.1f} bytes a label"),
        *_checks(label_set, manifests),
    ]
    if spec.generation is not None:
        facts.append(("generated", ", ".join(f"{n}={v}" for n, v in spec.generation)))
    return facts


def _checks(label_set: LabelSet, manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    """Results of the audits and the parity gate, if they ran."""
    facts = []
    audits = [manifest.fidelity for manifest in manifests if manifest.fidelity is not None]
    if audits:
        count = sum(audit.labels for audit in audits)
        mean = sum(audit.mean_kl * audit.labels for audit in audits) / count
        worst = max(audit.max_kl for audit in audits)
        covered = sum(audit.covered_mass * audit.labels for audit in audits) / count
        text = (
            f"{count:,} labels: storing them costs {mean:.1e} nats a label, {worst:.1e} at most; "
            f"heads cover {covered:.3f}"
        )
        facts.append(("audited", text))
    parity = read_parity(label_set.store)
    if parity is not None:
        text = (
            f"KL {parity.mean_kl:.1e} nats on {parity.labels:,} labels, log-probabilities "
            f"within {parity.max_logprob_difference:.1e} of {parity.reference}"
        )
        facts.append(("parity", text))
    return facts


def run_accounts(label_set: LabelSet) -> dict[str, Accounts]:
    """The accounts of each finished run, oldest first."""
    return {run: read_accounts(label_set, run) for run in finished_runs(label_set)}


def run_lines(runs: dict[str, Accounts]) -> list[tuple[str, ...]]:
    """The cells of each run under RUN_COLUMNS."""
    return [
        (
            run,
            f"{accounts.rows_read:,}",
            f"{accounts.rows_labelled:,}",
            f"{accounts.rows_reused:,}",
            f"{accounts.rows_duplicate:,}",
            f"{accounts.rows_quarantined:,}",
            ", ".join(f"{reason} {count}" for reason, count in accounts.reasons.items()),
        )
        for run, accounts in runs.items()
    ]


def summary(values: npt.NDArray[np.float64]) -> dict[str, float]:
    """Computes count, mean and quantiles."""
    quantiles = {f"q{q:02d}": float(np.quantile(values, q / 100)) for q in (1, 5, 25, 50, 75, 95)}
    return {"n": float(len(values)), "mean": float(values.mean()), **quantiles}

"""`tutelage labels show`: what a label set is, what its runs did, and what its labels look like."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.labels.show.token_text import TokenText
from cluster.labels.terminal import distribution_lines, size_text, table
from schemas.errors import DamagedError, MissingError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.label_set.parity_result import read_parity
from schemas.label_set.roster import Accounts, read_accounts
from schemas.maintenance.listing import record_text, teacher_text
from schemas.maintenance.sample import (
    LabelledPosition,
    SampledGroup,
    distributions,
    labelled_positions,
    sample_groups,
)

EXCERPT_CHARACTERS = 240
SHOWN_ENTRIES = 6
RUN_COLUMNS = ("run", "read", "labelled", "reused", "duplicate", "quarantined", "reasons")


def show(
    url: str, num_groups: int, num_rows: int, num_positions: int, seed: int
) -> tuple[str, dict[str, Any]]:
    """Text for people, and the same facts as plain values.

    Raises:
        StoreError: there is no label set, or it is damaged.
    """
    label_set = LabelSet.open(url)
    runs = run_accounts(label_set)
    groups = sample_groups(label_set, num_groups, seed)
    parts = [_head(label_set), _runs(runs)]
    values = distributions(groups)
    if groups:
        labels = sum(group.rows.num_labels for group in groups)
        parts.append(
            f"in {len(groups)} row groups drawn with seed {seed} ({labels:,} labels):\n"
            + distribution_lines(list(values.items()))
        )
    text = TokenText(_vocabulary(label_set))
    rng = np.random.default_rng(seed)
    for _ in range(num_rows if groups else 0):
        group = groups[int(rng.integers(len(groups)))]
        parts.append(_row(group, int(rng.integers(len(group.rows))), text, num_positions))
    facts = {
        "url": url,
        "fingerprint": label_set.fingerprint,
        "spec": label_set.spec.model_dump(mode="json"),
        "runs": {run: accounts.model_dump() for run, accounts in runs.items()},
        "distributions": {name: summary(found) for name, found in values.items()},
    }
    return "\n\n".join(parts), facts


def summary(values: np.ndarray) -> dict[str, float]:
    """Number, mean and quantiles of some values."""
    quantiles = {f"q{q:02d}": float(np.quantile(values, q / 100)) for q in (1, 5, 25, 50, 75, 95)}
    return {"n": float(len(values)), "mean": float(values.mean()), **quantiles}


def run_accounts(label_set: LabelSet) -> dict[str, Accounts]:
    """The accounts of each closed run, the first run first."""
    runs = [
        rel.rsplit("/", 1)[-1].removesuffix(".parquet")
        for rel in label_set.store.list("rosters", ".parquet")
    ]
    return {run: read_accounts(label_set, run) for run in runs}


def _vocabulary(label_set: LabelSet) -> dict[str, int]:
    if not label_set.vocabulary_file:
        return {}
    try:
        return label_set.vocabulary()
    except (MissingError, DamagedError):
        return {}  # ids are shown as numbers


def _head(label_set: LabelSet) -> str:
    manifests = label_set.manifests()
    labels = sum(manifest.num_labels for manifest in manifests)
    size = sum(manifest.size_bytes for manifest in manifests)
    spec = label_set.spec
    seconds = sum(float(m.provenance.get("seconds", 0.0)) for m in manifests)
    backends = {str(m.provenance["backend"]) for m in manifests if "backend" in m.provenance}
    lines = [
        ("label set", f"{label_set.url} (fingerprint {label_set.fingerprint})"),
        ("record", record_text(spec.record)),
        ("columns", ", ".join(spec.record.columns)),
        ("teacher", teacher_text(label_set, manifests)),
        ("weights", spec.teacher.weights_digest or "none"),
        ("numerics", f"{spec.teacher.dtype}, head {spec.teacher.head_dtype}"),
        ("backend", ", ".join(sorted(backends)) or "not recorded"),
        ("vocabulary", f"{spec.teacher.vocab_size:,} ids"),
        ("text", ", ".join(f"{name}={value}" for name, value in spec.text)),
        ("units", f"{len(manifests):,} in {seconds:,.0f} s of teachers"),
        ("rows", f"{sum(m.num_rows for m in manifests):,}"),
        ("tokens", f"{sum(m.num_tokens for m in manifests):,}"),
        ("labels", f"{labels:,}"),
        ("quarantined", f"{len(label_set.quarantine()):,}"),
        ("size", f"{size_text(size)}, {size / labels if labels else 0:.1f} bytes a label"),
    ]
    lines += _gates(label_set, manifests)
    if spec.generation is not None:
        lines.append(("generated", ", ".join(f"{n}={v}" for n, v in spec.generation)))
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _gates(label_set: LabelSet, manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    """What audits and the parity gate found, as far as they were made."""
    lines = []
    audits = [manifest.fidelity for manifest in manifests if manifest.fidelity is not None]
    if audits:
        count = sum(audit.labels for audit in audits)
        mean = sum(audit.mean_kl * audit.labels for audit in audits) / count
        covered = sum(audit.covered_mass * audit.labels for audit in audits) / count
        lines.append(
            (
                "audited",
                f"{count:,} labels: storing them cost {mean:.1e} nats a label, "
                f"{max(audit.max_kl for audit in audits):.1e} at most; heads cover {covered:.3f}",
            )
        )
    parity = read_parity(label_set.store)
    if parity is not None:
        lines.append(
            (
                "parity",
                f"KL {parity.mean_kl:.1e} nats on {parity.labels:,} labels, log-probabilities "
                f"within {parity.max_logprob_difference:.1e} of {parity.reference}",
            )
        )
    return lines


def _runs(runs: dict[str, Accounts]) -> str:
    if not runs:
        return "no finished run"
    return table(RUN_COLUMNS, run_lines(runs), right=range(1, 6))


def run_lines(runs: dict[str, Accounts]) -> list[tuple[str, ...]]:
    """One line a run, under RUN_COLUMNS."""
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


def _row(group: SampledGroup, row: int, text: TokenText, num_positions: int) -> str:
    """One row: an excerpt, then a run of its labels with the teacher's alternatives."""
    rows = group.rows
    start, end = rows.token_offsets[row], rows.token_offsets[row + 1]
    excerpt = text.text(rows.token_ids[start : min(end, start + EXCERPT_CHARACTERS)])
    excerpt = excerpt[:EXCERPT_CHARACTERS].rstrip()
    lines = [
        f"row {row} of row group {group.row_group} in {group.shard}, key "
        f"{rows.row_key[row].tobytes().hex()}: {end - start} tokens, "
        f"{rows.label_offsets[row + 1] - rows.label_offsets[row]} labels",
        *(f"  | {line}" for line in excerpt.splitlines()),
    ]
    positions = labelled_positions(rows, row)
    first = max(0, len(positions) // 2 - num_positions // 2)
    shown = positions[first : first + num_positions]
    if not shown:
        return "\n".join(lines)
    head = ("target", "token", "p", "rank", "head", "draws", "the teacher's head | its draws")
    cells = [_position(position, text) for position in shown]
    return "\n".join([*lines, table(head, cells, right=(0, 2, 3, 4, 5))])


def _position(position: LabelledPosition, text: TokenText) -> tuple[str, ...]:
    head = [f"{_quoted(text, id_)} {_p(lp)}" for id_, lp in position.head[:SHOWN_ENTRIES]]
    if len(position.head) > SHOWN_ENTRIES:
        head.append(f"+{len(position.head) - SHOWN_ENTRIES}")
    draws = [
        f"{_quoted(text, id_)} {_p(lp)}" + (f" x{count}" if count > 1 else "")
        for id_, lp, count in position.draws[:SHOWN_ENTRIES]
    ]
    if len(position.draws) > SHOWN_ENTRIES:
        draws.append(f"+{len(position.draws) - SHOWN_ENTRIES}")
    both = "  ".join(head) + (" | " + "  ".join(draws) if draws else "")
    return (
        str(position.target),
        _quoted(text, position.token),
        _p(position.logprob),
        f"{position.rank:,}",
        str(len(position.head)),
        str(len(position.draws)),
        both,
    )


def _quoted(text: TokenText, id_: int) -> str:
    return f"'{text.token(id_)}'"


def _p(logprob: float) -> str:
    probability = math.exp(logprob)
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.0e}"

"""`tutelage labels show`: facts, runs, distributions and sample rows of a label set."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.labels.facts import RUN_COLUMNS, label_set_facts, run_accounts, run_lines, summary
from cluster.labels.show.histograms import distribution_table
from cluster.labels.show.token_text import TokenText
from schemas.console.text import table
from schemas.errors import DamagedError, MissingError
from schemas.label_set.label_set import LabelSet
from schemas.maintenance.sample import (
    LabelledPosition,
    SampledGroup,
    distributions,
    labelled_positions,
    sample_groups,
)

EXCERPT_CHARACTERS = 240
SHOWN_ENTRIES = 6


def show(
    url: str, num_groups: int, num_rows: int, num_positions: int, seed: int
) -> tuple[str, dict[str, Any]]:
    """Returns the text to print, and the same facts as plain values.

    Raises:
        StoreError: the label set does not exist or is damaged.
    """
    label_set = LabelSet.open(url)
    runs = run_accounts(label_set)
    groups = sample_groups(label_set, num_groups, seed)
    values = distributions(groups)
    parts = [
        "\n".join(f"{name:<12} {value}" for name, value in label_set_facts(label_set)),
        table(RUN_COLUMNS, run_lines(runs), right=range(1, 6)) if runs else "no finished run",
    ]
    if groups:
        labels = sum(group.rows.num_labels for group in groups)
        parts.append(
            f"{len(groups)} row groups sampled with seed {seed} ({labels:,} labels):\n"
            + distribution_table(values)
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


def _vocabulary(label_set: LabelSet) -> dict[str, int]:
    if not label_set.vocabulary_file:
        return {}
    try:
        return label_set.vocabulary()
    except (MissingError, DamagedError):
        return {}  # without a vocabulary, tokens are shown as ids


def _row(group: SampledGroup, row: int, text: TokenText, num_positions: int) -> str:
    """Formats a row: an excerpt, then consecutive labels with the teacher's alternatives."""
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
    # Labels from the middle of the row, where the teacher has context.
    first = max(0, len(positions) // 2 - num_positions // 2)
    shown = positions[first : first + num_positions]
    if not shown:
        return "\n".join(lines)
    head = ("target", "token", "p", "rank", "head", "draws", "the teacher's head | its draws")
    cells = [_position(position, text) for position in shown]
    return "\n".join([*lines, table(head, cells, right=(0, 2, 3, 4, 5))])


def _position(position: LabelledPosition, text: TokenText) -> tuple[str, ...]:
    head = _entries([(id_, logprob, 1) for id_, logprob in position.head], text)
    draws = _entries(position.draws, text)
    return (
        str(position.target),
        _quoted(text, position.token),
        _p(position.logprob),
        f"{position.rank:,}",
        str(len(position.head)),
        str(len(position.draws)),
        f"{head} | {draws}" if draws else head,
    )


def _entries(entries: Sequence[tuple[int, float, int]], text: TokenText) -> str:
    """Formats the first (id, log-probability, count) entries, and the number of the rest."""
    cells = [
        f"{_quoted(text, id_)} {_p(logprob)}" + (f" x{count}" if count > 1 else "")
        for id_, logprob, count in entries[:SHOWN_ENTRIES]
    ]
    if len(entries) > SHOWN_ENTRIES:
        cells.append(f"+{len(entries) - SHOWN_ENTRIES}")
    return "  ".join(cells)


def _quoted(text: TokenText, id_: int) -> str:
    return f"'{text.token(id_)}'"


def _p(logprob: float) -> str:
    probability = math.exp(logprob)
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.0e}"

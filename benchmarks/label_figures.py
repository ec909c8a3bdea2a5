"""From seconds to figures: what `benchmarks.label` says about one model."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Seconds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Generated:
    """One repeat of generation.

    Attributes:
        num_tokens: of prompts and responses.
        alone_s: generating, no more.
        committed_s: generating, scoring and committing.
        prefill_s: plain prefill of prompts and responses, which scoring cannot do without.
        floor_s: the head's product and a logsumexp at each token of the responses.
    """

    num_tokens: int
    alone_s: float
    committed_s: float
    prefill_s: float
    floor_s: float


def engine_figures(seconds: Seconds, kinds: Sequence[str], num_tokens: int) -> dict[str, Any]:
    """Speeds and efficiencies; those of the first kind of record stand at the top.

    Ratios are taken repeat by repeat, and only then their median: a repeat in which the machine was
    slow was slow for plain prefill too.
    """
    plain, floor = np.array(seconds["plain"]), np.array(seconds["floor"])
    by_kind = {}
    for kind in kinds:
        ours = np.array(seconds[kind])
        by_kind[kind] = {
            "labelled_tokens_per_s": num_tokens / statistics.median(seconds[kind]),
            "efficiency": float(np.median(plain / ours)),
            "efficiency_over_limit": float(np.median((plain + floor) / ours)),
            "efficiency_over_limit_of_least_times": float((plain.min() + floor.min()) / ours.min()),
        }
    return {
        "plain_tokens_per_s": num_tokens / statistics.median(seconds["plain"]),
        **by_kind[kinds[0]],
        "limit": float(np.median(plain / (plain + floor))),
        "stock_tokens_per_s": {
            name: num_tokens / statistics.median(seconds[f"stock_{name}"])
            for name in ("flat", "dict")
        },
        "records": by_kind,
        "num_tokens": num_tokens,
        "seconds": seconds,
    }


def generation_figures(repeats: Sequence[Generated], samples: int) -> dict[str, Any]:
    """The same of responses: `plain` is generation alone, in tokens of prompts and responses."""
    alone, committed, prefill, floor = (
        np.array([getattr(one, name) for one in repeats])
        for name in ("alone_s", "committed_s", "prefill_s", "floor_s")
    )
    num_tokens = repeats[0].num_tokens
    least = alone + prefill + floor
    return {
        "n": samples,
        "num_tokens": num_tokens,
        "plain_tokens_per_s": num_tokens / float(np.median(alone)),
        "labelled_tokens_per_s": num_tokens / float(np.median(committed)),
        "limit": float(np.median(alone / least)),
        "efficiency": float(np.median(alone / committed)),
        "efficiency_over_limit": float(np.median(least / committed)),
    }

"""Random inputs of the fused head, for every kind of record."""

import numpy as np
import torch

from schemas.spec import RecordSpec
from tests.support.distillation_oracle import drawn_targets, random_targets

L, H, V, T = 29, 12, 40, 23
TEMPERATURES = (0.5, 2.0)
RECORDS = {
    "head": None,
    "threshold": RecordSpec(kind="threshold", tau=0.06, temperatures=TEMPERATURES),
    "threshold at 1": RecordSpec(
        kind="threshold", tau=0.06, temperatures=TEMPERATURES, draw_temperature=1.0
    ),
    "sampled": RecordSpec(kind="sampled", draws=9, temperatures=TEMPERATURES),
}


def inputs(
    seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0, record: str = "head"
):
    rng = np.random.default_rng(seed)
    spec = RECORDS[record]
    targets = (
        random_targets(rng, T, V, L, TEMPERATURES)
        if spec is None
        else drawn_targets(rng, spec, T, V, L)
    )
    hidden = torch.from_numpy(rng.normal(0, scale, (L, H))).to(dtype).requires_grad_()
    weight = torch.from_numpy(rng.normal(0, 1, (V, H))).to(dtype).requires_grad_()
    bias = torch.from_numpy(rng.normal(0, 1, V)).to(dtype).requires_grad_()
    return hidden, weight, bias, targets

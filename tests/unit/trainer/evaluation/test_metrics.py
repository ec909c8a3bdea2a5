import math

import numpy as np
import pytest
import torch

from trainer.evaluation.metrics import Calibration, Tally, kl_divergence


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def naive(logits: np.ndarray, teacher: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Every metric position by position."""
    ce = kl = agree = hits = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, other, token in zip(logits, teacher, tokens, strict=True):
        q, p = softmax(row), softmax(other)
        ce -= math.log(q[token])
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        top = int(np.argmax(q))
        agree += top == int(np.argmax(p))
        hits += top == token
        place = next(i for i in range(15) if q[top] <= (i + 1) / 15 or i == 14)
        bins[place].append((q[top], top == token))
    n = len(tokens)
    ece = sum(
        len(b) / n * abs(np.mean([c for c, _ in b]) - np.mean([h for _, h in b])) for b in bins if b
    )
    return {"ce": ce, "kl": kl, "agreements": agree, "hits": hits, "ece": ece}


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_metrics_equal_a_naive_count(spread):
    rng = np.random.default_rng(0)
    logits, teacher = (rng.normal(0, spread, (200, 30)).astype(np.float32) for _ in range(2))
    tokens = np.where(rng.random(200) < 0.5, logits.argmax(1), rng.integers(0, 30, 200))
    tally = Tally()
    for part in np.array_split(np.arange(200), 7):
        tally.add(*(torch.from_numpy(x[part]) for x in (logits, teacher, tokens)))
    expected = naive(logits.astype(float), teacher.astype(float), tokens)
    assert tally.num_labels == 200
    assert tally.ce == pytest.approx(expected["ce"], rel=1e-5)
    assert tally.kl == pytest.approx(expected["kl"], rel=1e-5)
    assert tally.agreements == expected["agreements"]
    assert tally.hits == expected["hits"]
    assert tally.calibration.error == pytest.approx(expected["ece"], rel=1e-4)


def test_model_is_at_no_distance_from_itself():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    tally = Tally()
    tally.add(logits, logits, torch.zeros(50, dtype=torch.long))
    assert tally.kl == 0.0
    assert tally.agreements == 50


def test_padding_ids_of_one_model_do_not_count():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 20, generator=generator)
    student = torch.randn(50, 20, generator=generator)
    padded = torch.cat([student, torch.full((50, 4), 3.0)], 1)
    expected = kl_divergence(teacher, student)
    torch.testing.assert_close(kl_divergence(teacher, padded), expected)


def test_teacher_that_excludes_an_id_gives_a_finite_distance():
    teacher = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert torch.isfinite(kl_divergence(teacher, torch.zeros(1, 3))).all()


def test_calibration_of_a_model_that_is_right_as_often_as_it_says():
    calibration = Calibration()
    calibration.add(torch.full((1000,), 0.75), torch.arange(1000) % 4 != 0)
    assert calibration.error == pytest.approx(0.0)
    calibration.add(torch.ones(1000), torch.zeros(1000, dtype=torch.bool))
    assert calibration.error == pytest.approx(0.5)


def test_edges_of_bins_belong_to_the_bin_below():
    calibration = Calibration()
    calibration.add(torch.tensor([0.0, 1.0]), torch.tensor([True, True]))
    assert calibration.counts[0] == calibration.counts[14] == 1


def test_no_positions_have_no_error():
    assert math.isnan(Calibration().error)

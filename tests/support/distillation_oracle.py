"""Dense float64 losses, written from their definitions, and random labels to test them with.

Shares no code with the trainer: logits are [T, V] and gradients come from autograd.
"""

import numpy as np
import torch
from torch import Tensor

from schemas.spec import RecordSpec
from trainer.config.train import LossConfig
from trainer.head.fused_head import LogitTransform
from trainer.losses.targets import SparseTargets


def random_targets(
    rng: np.random.Generator,
    num_labels: int,
    vocab_size: int,
    num_tokens: int,
    temperatures: tuple[float, ...] = (),
    head_sizes: np.ndarray | None = None,
    spread: float = 2.0,
) -> SparseTargets:
    """Top entries of random teachers in float16, as a record stores them.

    Args:
        rng: random generator.
        num_labels: T.
        vocab_size: V.
        num_tokens: L, number of hidden states; each belongs to at most one position.
        temperatures: temperatures with a stored normaliser.
        head_sizes: [T], entries per position; None: random, 1 to V // 2.
        spread: standard deviation of the teacher's logits; larger is sharper.
    """
    if head_sizes is None:
        head_sizes = rng.integers(1, max(2, vocab_size // 2), num_labels)
    logits = rng.normal(0, spread, (num_labels, vocab_size))
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logp, axis=1, kind="stable")
    ids = [order[j, : head_sizes[j]] for j in range(num_labels)]
    tail = [np.exp(np.delete(logp[j], ids[j])).sum() for j in range(num_labels)]
    with np.errstate(divide="ignore"):
        tail_logmass = np.log(np.array(tail))
    lse = [[np.log(np.exp(row / t).sum()) for t in temperatures] for row in logp]
    flat_ids = np.concatenate([*ids, np.zeros(0, np.int64)]).astype(np.int32)
    flat_logp = np.concatenate([logp[j, ids[j]] for j in range(num_labels)])
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(head_sizes)]))
    return _targets(
        rng,
        RecordSpec(temperatures=temperatures),
        vocab_size,
        num_tokens,
        entry_ids=torch.from_numpy(flat_ids),
        entry_logprobs=torch.from_numpy(flat_logp.astype(np.float16)),
        entry_bounds=bounds,
        entry_offsets=bounds,
        entry_draws=None,
        tail_logmass=torch.from_numpy(tail_logmass.astype(np.float16)),
        lse=torch.from_numpy(np.array(lse).astype(np.float16)) if temperatures else None,
    )


def drawn_targets(
    rng: np.random.Generator,
    record: RecordSpec,
    num_labels: int,
    vocab_size: int,
    num_tokens: int,
    spread: float = 2.0,
) -> SparseTargets:
    """Labels of random teachers with tail draws, made position by position.

    Kind ``sampled`` draws as in Random Sampling KD (arXiv 2503.16870); ``threshold`` samples the
    tail systematically, as `schemas.spec.RecordSpec` defines.

    Args:
        rng: random generator.
        record: a record of kind sampled or threshold.
        num_labels, vocab_size, num_tokens, spread: as for `random_targets`.
    """
    logits = rng.normal(0, spread, (num_labels, vocab_size))
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    drawn = [_drawn_entries(rng, record, row) for row in logp]
    lse = [[np.log(np.exp(row / t).sum()) for t in record.temperatures] for row in logp]
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum([len(ids) for ids, _, _ in drawn])]))
    at_entries = [row[ids] for row, (ids, _, _) in zip(logp, drawn, strict=True)]
    with np.errstate(divide="ignore"):
        tail = np.log([mass for _, _, mass in drawn])
    return _targets(
        rng,
        record,
        vocab_size,
        num_tokens,
        entry_ids=torch.from_numpy(np.concatenate([ids for ids, _, _ in drawn]).astype(np.int32)),
        entry_logprobs=torch.from_numpy(np.concatenate(at_entries).astype(np.float16)),
        entry_bounds=bounds,
        entry_offsets=bounds,
        entry_draws=torch.from_numpy(np.concatenate([c for _, c, _ in drawn]).astype(np.uint8)),
        tail_logmass=torch.from_numpy(np.minimum(tail, 0.0).astype(np.float16)),
        lse=torch.from_numpy(np.array(lse).astype(np.float16)) if record.temperatures else None,
    )


def _drawn_entries(
    rng: np.random.Generator, record: RecordSpec, logp: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Ids (head, then draws by ascending id), draw counts, and the mass outside the head."""
    p_s = np.exp(logp / record.drawn_at)
    p_s /= p_s.sum()
    if record.kind == "sampled":
        ids, counts = np.unique(rng.choice(len(logp), record.draws, p=p_s), return_counts=True)
        return ids, counts, 1.0
    order = np.argsort(-logp, kind="stable")
    head = order[: max(1, int((p_s >= record.tau).sum()))]
    tail = np.sort(order[len(head) :])
    edges = np.cumsum(p_s[tail])
    points = np.arange(rng.random() * record.tau, edges[-1] if len(tail) else 0.0, record.tau)
    draws = tail[np.minimum(np.searchsorted(edges, points, side="right"), len(tail) - 1)]
    counts = np.concatenate([np.zeros(len(head), int), np.ones(len(draws), int)])
    return np.concatenate([head, draws]), counts, float(np.exp(logp[tail]).sum())


def _targets(
    rng: np.random.Generator,
    record: RecordSpec,
    vocab_size: int,
    num_tokens: int,
    **entries: Tensor | None,
) -> SparseTargets:
    """Targets with these entries at random positions, with random hard labels and weights."""
    num_labels = len(entries["entry_bounds"]) - 1
    return SparseTargets(
        positions=torch.from_numpy(np.sort(rng.permutation(num_tokens)[:num_labels])),
        token_ids=torch.from_numpy(rng.integers(0, vocab_size, num_labels)),
        weights=torch.from_numpy(rng.uniform(0.2, 2.0, num_labels).astype(np.float32)),
        record=record,
        num_ids=vocab_size,
        **entries,
    )


def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    loss: LossConfig,
    transform: LogitTransform | None = None,
) -> Tensor:
    """The weighted sum of losses over positions, from [T, V] logits in the dtype of `hidden`."""
    logits = hidden[targets.positions] @ weight.T
    if bias is not None:
        logits = logits + bias
    if transform is not None:
        logits = logits * transform.scale
        if transform.softcap is not None:
            logits = transform.softcap * torch.tanh(logits / transform.softcap)
    position_weights = targets.weights.to(logits.dtype)
    ce = torch.nn.functional.cross_entropy(logits, targets.token_ids, reduction="none")
    if loss.kind == "hard":
        return (position_weights * ce).sum()
    kl = torch.stack(
        [_position_kl(row, targets, j, loss) for j, row in enumerate(logits / loss.temperature)]
    )
    mixed = (1 - loss.alpha) * ce + loss.alpha * loss.temperature**2 * kl
    return (position_weights * mixed).sum()


def _position_kl(logits: Tensor, targets: SparseTargets, j: int, loss: LossConfig) -> Tensor:
    """KL of one position, from a [V] row of logits at the distillation temperature."""
    if loss.kind == "forward_kl":
        return _position_estimate(logits, targets, j, loss.temperature)
    cut = slice(int(targets.entry_bounds[j]), int(targets.entry_bounds[j + 1]))
    ids = targets.entry_ids[cut].long()
    scaled = targets.entry_logprobs[cut].to(logits.dtype) / loss.temperature
    if loss.temperature == 1.0:
        tail = targets.tail_logmass[j].to(logits.dtype).exp()
        if targets.entry_draws is not None:
            tail = (tail - scaled.exp()[targets.entry_draws[cut] > 0].sum()).clamp(min=0.0)
        w = scaled.exp() * (1 - tail) / scaled.exp().sum()
    else:
        column = targets.temperatures.index(loss.temperature)
        w = (scaled - targets.lse[j, column].to(logits.dtype)).exp()
        w = w / max(1.0, float(w.sum()))
        tail = 1 - w.sum()
    log_q = torch.log_softmax(logits, 0)
    off = torch.ones_like(logits, dtype=torch.bool)
    off[ids] = False
    if loss.kind in ("reverse_kl", "jsd", "skew_kl", "tvd"):
        tail_q = torch.logsumexp(log_q[off], 0) if off.any() else log_q.new_tensor(-torch.inf)
        return _divergence(
            torch.cat([w, tail.clamp(min=0.0)[None]]), torch.cat([log_q[ids], tail_q[None]]), loss
        )
    if loss.kind == "truncated":
        return (torch.xlogy(w, w) - w * log_q[ids]).sum()
    if loss.kind == "renormalised":
        w = w / w.sum()
        return (torch.xlogy(w, w) - w * log_q[ids]).sum()
    if loss.kind != "ghost":
        raise ValueError(f"no oracle for loss kind {loss.kind!r}")
    kl = (torch.xlogy(w, w) - w * log_q[ids]).sum()
    if tail > 1e-12:
        kl = kl + tail * (tail.log() - torch.logsumexp(log_q[off], 0))
    return kl


def _divergence(p: Tensor, log_q: Tensor, loss: LossConfig) -> Tensor:
    """Divergence of two distributions over the same outcomes, the last one being the bucket."""
    q = log_q.exp()
    if loss.kind == "tvd":
        return (p - q).abs().sum() / 2
    if loss.kind == "reverse_kl":
        return _kl(q, p.clamp(min=1e-6))
    if loss.kind == "skew_kl":
        return _kl(p, loss.skew * p + (1 - loss.skew) * q)
    mixture = loss.beta * p + (1 - loss.beta) * q
    return loss.beta * _kl(p, mixture) + (1 - loss.beta) * _kl(q, mixture)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a log(a / b) over outcomes where a > 0."""
    held = a > 0
    return (a[held] * (a[held].log() - b[held].log())).sum()


def _position_estimate(
    logits: Tensor, targets: SparseTargets, j: int, temperature: float
) -> Tensor:
    """Sum of w (log p_T - log q_T) with the Horvitz-Thompson weights of a position's draws."""
    cut = slice(int(targets.entry_bounds[j]), int(targets.entry_bounds[j + 1]))
    record, draws = targets.record, targets.entry_draws[cut]

    def log_p(at: float) -> Tensor:
        lp = targets.entry_logprobs[cut].to(logits.dtype)
        if at == 1.0:
            head = lp[draws == 0]
            mass = 1 - targets.tail_logmass[j].to(logits.dtype).exp()
            exact = torch.log(head.exp() * mass / head.exp().sum())
            return torch.cat([exact, lp[draws > 0]])
        lse = targets.lse[j, targets.temperatures.index(at)].to(logits.dtype)
        return lp / at - lse

    drawn = draws > 0
    p, p_s = log_p(temperature).exp(), log_p(record.drawn_at).exp()
    share = record.tau if record.kind == "threshold" else 1 / record.draws
    w = torch.where(drawn, draws.to(p.dtype) * share * p / p_s, p)
    log_q = torch.log_softmax(logits, 0)[targets.entry_ids[cut].long()]
    return (w * (log_p(temperature) - log_q)).sum()

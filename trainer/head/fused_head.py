"""The student's output head fused with its loss; a full [T, V] tensor never exists.

A language-model head maps T hidden states to T x V logits: 16 GB in float32 at 32k tokens and 128k
ids, and several times that with a loss and its gradient. This head works in chunks of positions:
logits, loss and gradient of a chunk share one buffer, and only the gradients of hidden states and
weight persist. The forward pass computes the gradient while the logits exist; the backward pass
scales it by the incoming gradient.

One pass over the logits of a chunk, at distillation temperature 1:

1. Read the logits of the hard label and of the cached ids S, then mask S in the row.
2. Softmax over the rest, in place. Combining its normaliser with S gives the full log-sum-exp, and
   the bucket's log mass without the cancellation in 1 - Q.
3. Compute loss and gradient of the objective on S and the bucket (`trainer.losses.objectives`),
   mixed with cross-entropy. Scaling the row by one factor gives the gradient off S; then the
   gradient on S is written over it.

So a distillation step costs as much as a cross-entropy step. A temperature other than 1 needs a
second softmax, hence a second pass and buffer.

Shapes: L tokens of the micro-batch, T labelled positions, H hidden size, V vocabulary, E entries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from schemas.errors import VocabularyError
from trainer.config.train import LossConfig
from trainer.head.chunk_size import chunk_tokens
from trainer.head.row_softmax import RowSoftmax, row_softmax
from trainer.losses.objectives import LossAndGradient, StudentPartition, evaluate_objective
from trainer.losses.targets import SparseTargets

METRICS = ("loss", "ce", "kl", "weight")


@dataclass(frozen=True)
class LogitTransform:
    """Transformation of a model's logits after the head: scale, then cap * tanh(logit / cap).

    Attributes:
        scale: factor on every logit.
        softcap: bound on the absolute value, as in Gemma 2; None: unbounded.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transforms logits [T, V] in place; returns tanh [T, V] for `backward_`, or None."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is None:
            return None
        bounded = logits.div_(self.softcap).tanh_().clone()
        logits.mul_(self.softcap)
        return bounded

    def backward_(self, gradient: Tensor, bounded: Tensor | None) -> None:
        """Backpropagates the gradient [T, V] through the transformation, in place."""
        if bounded is not None:
            gradient.mul_(bounded.square_().neg_().add_(1.0))
        if self.scale != 1.0:
            gradient.mul_(self.scale)


def fused_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    loss: LossConfig,
    transform: LogitTransform = LogitTransform(),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over positions of weight * ((1 - alpha) * CE + alpha * temperature^2 * KL).

    KL stands for the objective ``loss.kind``. "hard" is cross-entropy alone and ignores alpha.
    Logarithms and sums are float32 (float64 for a float64 head), as is gradient accumulation.

    Args:
        hidden: [..., H], all hidden states of the micro-batch; ``targets.positions`` index the
            flattened leading axes. Labels of token t use the state at t - 1.
        weight: [V, H], the head.
        bias: [V] or None.
        targets: labels of T positions, on the device of `hidden`.
        loss: objective, alpha, temperature and chunk size (`trainer.head.chunk_size`).
        transform: applied to the model's logits.

    Returns:
        The sum (scalar, nats, not divided by the weights), and detached sums over positions:

        - ``loss``: the same sum.
        - ``ce``: weight * CE.
        - ``kl``: weight * KL, without alpha and temperature^2; 0 for hard labels.
        - ``weight``: the weights.

    Raises:
        VocabularyError: the labels contain an id outside the head.
        ConfigError: the labels cannot serve the loss (`trainer.losses.compatibility`).
    """
    if targets.num_ids > weight.shape[0]:
        raise VocabularyError(
            f"labels name id {targets.num_ids - 1} but the student's head has {weight.shape[0]} "
            "rows; train a student with the labels' vocabulary"
        )
    flat = hidden.reshape(-1, hidden.shape[-1])
    # ctx.needs_input_grad ignores no_grad, so what is needed is determined here.
    enabled = torch.is_grad_enabled()
    wanted = _Wanted(
        hidden=enabled and hidden.requires_grad,
        weight=enabled and weight.requires_grad,
        bias=enabled and bias is not None and bias.requires_grad,
    )
    total, parts = _FusedDistillation.apply(flat, weight, bias, targets, loss, transform, wanted)
    return total, dict(zip(METRICS, parts.unbind(), strict=True))


@dataclass(frozen=True)
class _Wanted:
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


class _FusedDistillation(torch.autograd.Function):
    """See `fused_distillation_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: SparseTargets,
        loss: LossConfig,
        transform: LogitTransform,
        wanted: _Wanted,
    ) -> tuple[Tensor, Tensor]:
        head = _HeadPass(hidden, weight, bias, transform, wanted)
        parts = torch.zeros(len(METRICS), dtype=head.dtype, device=hidden.device)
        size = chunk_tokens(
            loss,
            targets.num_labels,
            weight.shape[0],
            weight.dtype,
            weight.device,
            transform.softcap is not None,
        )
        for start in range(0, targets.num_labels, size):
            stop = min(start + size, targets.num_labels)
            parts += head.run(targets.chunk(start, stop), loss)
        ctx.gradients = [head.d_hidden, head.d_weight, head.d_bias]
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        ctx.mark_non_differentiable(parts)
        return parts[0].clone(), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward through the fused head a second time; its gradients were freed"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # Popped one by one: each float32 gradient is freed once its half-precision copy exists.
        scaled = [_scaled(gradients.pop(0), grad_total, dtype) for dtype in ctx.dtypes]
        return (*scaled, None, None, None, None)


class _HeadPass:
    """Processes chunks of positions and accumulates the gradients.

    Attributes:
        d_hidden, d_weight, d_bias: [L, H], [V, H] and [V], at least float32; None if not wanted.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        wanted: _Wanted,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.transform, self.wanted = transform, wanted
        # Gradients stay in float32 until they are scaled. If they were rounded to half precision
        # first, scaling by 1 / N would give all values of a binade the same error, up to 0.4%.
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.buffer = hidden.new_empty(0, dtype=self.dtype)
        self.d_hidden = torch.zeros_like(hidden, dtype=self.dtype) if wanted.hidden else None
        self.d_weight = torch.zeros_like(weight, dtype=self.dtype) if wanted.weight else None
        self.d_bias = (
            torch.zeros_like(bias, dtype=self.dtype) if wanted.bias and bias is not None else None
        )

    def run(self, chunk: SparseTargets, loss: LossConfig) -> Tensor:
        """Accumulates the gradients of a chunk; returns its sums [4] in the order of METRICS."""
        rows = self.hidden.index_select(0, chunk.positions).to(self.weight.dtype)
        logits = self._logits(rows)
        bounded = self.transform.apply_(logits)
        ce, kl, gradient = _loss_and_gradient(logits, chunk, loss, self.wanted.any)
        if gradient is not None:
            self.transform.backward_(gradient, bounded)
            self._accumulate(gradient, rows, chunk.positions)
        return _sums(ce, kl, chunk.weights.to(self.dtype), loss)

    def _logits(self, rows: Tensor) -> Tensor:
        """Logits [T, V] of rows [T, H]; float32 chunks reuse one buffer."""
        if rows.dtype != self.dtype:
            logits = _mm_wide(rows, self.weight.t(), self.dtype)
            return logits if self.bias is None else logits.add_(self.bias)
        num_rows, vocab_size = rows.shape[0], self.weight.shape[0]
        if self.buffer.numel() < num_rows * vocab_size:
            self.buffer = self.buffer.new_empty(num_rows * vocab_size)
        logits = self.buffer[: num_rows * vocab_size].view(num_rows, vocab_size)
        torch.mm(rows, self.weight.t(), out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def _accumulate(self, gradient: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Backpropagates the chunk's logit gradient [T, V] into hidden, weight and bias."""
        if self.d_bias is not None:
            self.d_bias += gradient.sum(0)
        narrow = gradient.to(self.weight.dtype)
        if self.d_hidden is not None:
            self.d_hidden.index_add_(0, positions, _mm_wide(narrow, self.weight, self.dtype))
        if self.d_weight is not None:
            if narrow.dtype == self.dtype:
                self.d_weight.addmm_(narrow.t(), rows)
            else:
                self.d_weight += _mm_wide(narrow.t(), rows, self.dtype)


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.mul_(factor).to(dtype)


def _mm_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of two matrices of the same dtype, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def _loss_and_gradient(
    logits: Tensor, chunk: SparseTargets, loss: LossConfig, need_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """CE [T], KL [T] or None, and the weighted loss's gradient, which overwrites `logits`."""
    weights, softmax_of = chunk.weights.to(logits.dtype), row_softmax(loss, logits)
    if loss.kind == "hard" or loss.alpha == 0.0:
        ce = _cross_entropy(logits, chunk.token_ids, weights if need_gradient else None, softmax_of)
        return ce, None, logits if need_gradient else None
    if loss.temperature == 1.0:
        ce, kl = _distil(logits, chunk, loss, weights if need_gradient else None, softmax_of)
        return ce, kl, logits if need_gradient else None
    scaled = logits / loss.temperature
    factor = weights * (loss.alpha * loss.temperature)
    _, kl = _distil(scaled, chunk, loss, factor if need_gradient else None, softmax_of)
    hard = weights * (1.0 - loss.alpha) if need_gradient and loss.alpha < 1.0 else None
    ce = _cross_entropy(logits, chunk.token_ids, hard, softmax_of)
    if not need_gradient:
        return ce, kl, None
    return ce, kl, scaled if hard is None else scaled.add_(logits)


def _cross_entropy(
    logits: Tensor, token_ids: Tensor, weights: Tensor | None, softmax_of: type[RowSoftmax]
) -> Tensor:
    """Cross-entropy [T] in nats; with weights, `logits` becomes the gradient of weights * CE."""
    token_ids = token_ids[:, None]
    at_token = logits.gather(1, token_ids)[:, 0]
    softmax = softmax_of(logits)
    if weights is not None:
        softmax.times_(weights)
        logits.scatter_add_(1, token_ids, -weights[:, None])
    return softmax.lse - at_token


def _distil(
    logits: Tensor,
    chunk: SparseTargets,
    loss: LossConfig,
    weights: Tensor | None,
    softmax_of: type[RowSoftmax],
) -> tuple[Tensor, Tensor]:
    """CE and KL, [T] each, of logits [T, V] already divided by the distillation temperature.

    With weights, `logits` becomes the gradient of weights * KL. At temperature 1, where CE has the
    same softmax, it becomes the gradient of weights * ((1 - alpha) * CE + alpha * KL).
    """
    segments = chunk.segments()
    flat = segments.rows * logits.shape[1] + chunk.entry_ids
    flat_logits = logits.view(-1)
    at_entries = flat_logits.index_select(0, flat)
    at_token = logits.gather(1, chunk.token_ids[:, None])[:, 0]

    # Not -inf: if S contains every id, the row would become NaN. Here its bucket gets no mass.
    flat_logits.scatter_(0, flat, torch.finfo(logits.dtype).min)
    off = softmax_of(logits)
    lse = torch.logaddexp(off.lse, segments.logsumexp(at_entries))
    student = StudentPartition(at_entries.sub_(segments.spread(lse)), off.lse - lse, segments)
    result = evaluate_objective(chunk, loss, student)
    if weights is not None:
        share = loss.alpha if loss.temperature == 1.0 else 1.0
        tail, entries = _mixed(result, student, share)
        off.times_(weights * tail)
        flat_logits.scatter_(0, flat, segments.spread(weights) * entries)
        if share < 1.0:
            at = chunk.token_ids[:, None]
            logits.scatter_add_(1, at, (weights * (share - 1.0))[:, None])
    return lse - at_token, result.loss


def _mixed(
    objective: LossAndGradient, student: StudentPartition, alpha: float
) -> tuple[Tensor, Tensor]:
    """Gradients at the bucket [T] and at S [E] of alpha * objective + (1 - alpha) * CE.

    The gradient of CE is q - onehot; the caller subtracts the onehot.
    """
    if alpha == 1.0:
        return objective.tail_gradient, objective.entry_gradient
    return (
        alpha * objective.tail_gradient + (1.0 - alpha) * student.log_tail.exp(),
        alpha * objective.entry_gradient + (1.0 - alpha) * student.log_entries.exp(),
    )


def _sums(ce: Tensor, kl: Tensor | None, weights: Tensor, loss: LossConfig) -> Tensor:
    """The chunk's sums [4] in the order of METRICS."""
    ce_sum = torch.dot(weights, ce)
    if kl is None:
        zero = torch.zeros_like(ce_sum)
        return torch.stack([ce_sum, ce_sum, zero, weights.sum()])
    kl_sum = torch.dot(weights, kl)
    total = (1.0 - loss.alpha) * ce_sum + loss.alpha * loss.temperature**2 * kl_sum
    return torch.stack([total, ce_sum, kl_sum, weights.sum()])

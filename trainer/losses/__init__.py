"""Targets built from stored labels, and the objectives and divergences computed on them.

- *Targets* (`targets.SparseTargets`): the labels of a micro-batch, as tensors.
- An *objective* (``loss.kind``): a rule that maps targets and student probabilities to a value and
  a gradient per position.
- A *divergence* (`divergences`): an objective that is a sum over the cached ids and one bucket for
  all other ids.
- The *loss*: (1 - alpha) * CE + alpha * T^2 * objective, where ``loss.mix`` may replace the
  objective by a weighted sum of several.

A new divergence is one entry in `divergences.DIVERGENCES` and its name in
`trainer.config.train.LossKind`. Nothing here depends on the student's model or allocates a tensor
as wide as the vocabulary.
"""

"""Targets built from stored labels, and the objectives and divergences on them.

A new divergence is one entry in `divergences.DIVERGENCES` and its name in
`trainer.config.train.LossKind`. Nothing here knows the student or holds a tensor as wide as the
vocabulary.
"""

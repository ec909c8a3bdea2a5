"""Targets built from stored labels, and the objectives and divergences over them.

A new divergence is one entry in `divergences`. No student, no vocabulary-sized tensor.
"""

"""Checks that labels pass before they are published: fidelity per unit, parity once per label set.

Measures and refuses; never changes a label.
"""

"""Checks that labels pass before they are published: fidelity per unit, parity once per label set.

Measures and rejects; never changes a label.
"""

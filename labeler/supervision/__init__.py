"""Keeps a teacher alive: records attempts, restarts engines, halves units that crash them.

Treats the teacher as a black box behind the protocol; knows no engine and no Ray.
"""

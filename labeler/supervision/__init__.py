"""Keeps a teacher alive: attempts, watchdog, restarts, halving of units that crash engines.

Treats the teacher as a black box behind the protocol; knows no engine and no Ray.
"""

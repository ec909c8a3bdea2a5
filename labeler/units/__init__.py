"""Labels one unit of requests as one batch of rows, and groups requests into units.

Committing a unit belongs to `run`; producing a label belongs to `teachers`.
"""

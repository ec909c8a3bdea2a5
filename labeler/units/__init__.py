"""One unit of requests to one batch of label rows, and how requests are grouped into units.

Committing a unit belongs to `run`; producing a label belongs to `teachers`.
"""

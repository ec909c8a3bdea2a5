"""Views to batches: row order, packing, mixtures, the loader.

The order of rows is a pure function of view, seed and epoch. Nothing here knows the student or how
a loss is computed.
"""

"""Views to batches: row order, packing, mixtures, the loader.

Order is a pure function of view, seed and epoch. Nothing here knows the student or how a loss is
computed.
"""

"""From views to batches: row order, packing, mixtures, the loader.

- A *pack* is one packed sequence: complete rows, together at most ``data.max_tokens`` long.
- A *lane* is one of ``data.sequences_per_step`` independent streams of packs. Global step s takes
  pack s of every lane, and rank r of W reads the lanes r mod W.

The row order is a pure function of view, seed and epoch. Nothing here depends on the student or on
how a loss is computed.
"""

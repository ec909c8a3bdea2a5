"""Logits to labels, batched and in reused memory, with torch or numpy kernels.

Knows tensors and the record spec only: no teacher, no tokens, no files.
"""

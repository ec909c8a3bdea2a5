"""Logits to labels, batched and in reused memory, with torch or numpy kernels.

Depends only on tensors and the record spec: no teacher, no tokens, no files.
"""

"""Evaluation on held-out rows: during training, and against the teacher afterwards."""

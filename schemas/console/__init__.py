"""Console output: progress of long commands; durations, sizes and tables as text.

Knows nothing of labels or training, so every command and job can use it.
"""

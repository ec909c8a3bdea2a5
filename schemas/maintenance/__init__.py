"""Maintenance of label sets: verify, list, sample, collect garbage.

For the command line only; labeler and trainer never import it.
"""

"""Maintenance of label sets: verifies, lists, samples, collects garbage.

Only the command line uses it; labeler and trainer never import it.
"""

"""Looking after label sets: verify, list, sample, collect garbage.

Used by the command line alone; labeler and trainer never import it.
"""

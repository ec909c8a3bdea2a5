"""The checkpoint folder of a teacher: identity, vocabulary, digest of the weights.

Reads files; never runs the model.
"""

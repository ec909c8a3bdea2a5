"""What a teacher's checkpoint folder is: identity, vocabulary, digest of the weights.

Reads files; never runs the model.
"""

"""A job's place on a Ray cluster: the session, resources, placement of teacher replicas.

Knows nothing of rows or labels.
"""

"""Runs a job on a Ray cluster: the session, resources, placement of teacher replicas.

Independent of rows and labels.
"""

"""A folder of committed units: description, manifests, shards, key tables, rosters.

Selecting rows from label sets belongs to `views`.
"""

"""A folder of committed units: description, manifests, shards, key tables, rosters.

Writes and reads what a label set consists of; choosing rows from it belongs to `views`.
"""

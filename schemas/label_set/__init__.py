"""Label sets: folders of committed units with manifests, shards, key tables and rosters.

`schemas.views` selects rows from them.
"""

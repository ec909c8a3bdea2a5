"""Source files to requests: listing, reading, templates, tokenising, windows, keys.

Imports only `config` and `schemas`: nothing here knows a teacher, a model or Ray.
"""

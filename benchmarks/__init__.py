"""One module a claim: each prints a table and, with ``--json PATH``, leaves the figures as JSON."""

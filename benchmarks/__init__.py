"""One module per claim. Each prints a table and, with ``--json PATH``, writes JSON."""

"""The labelling job: checks, the Ray Data pipeline, ledger, accounts and summary.

The only room besides `planning` that knows Ray. How a row is read or labelled does not belong here.
"""

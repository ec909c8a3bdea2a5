"""The labelling job: checks, the Ray Data pipeline, ledger, accounts and summary.

The only room besides `planning` that uses Ray. Reading and labelling rows belong elsewhere.
"""

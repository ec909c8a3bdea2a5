"""The labelling job: checks, the Ray Data pipeline, ledger, accounts and summary.

Only this package and `planning` use Ray. Reading and labelling rows belong elsewhere.
"""

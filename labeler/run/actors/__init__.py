"""Code for Ray's worker processes: corpus tasks, teacher actors, the ledger of claimed rows.

``setup`` is the only job state they receive. ``labeler.run.pipeline`` starts them.
"""

"""What runs in Ray's worker processes: corpus tasks, teacher actors, the ledger of claimed rows.

``setup`` is all they know of the job. Starting them belongs to ``labeler.run.pipeline``.
"""

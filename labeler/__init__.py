"""Labelling: a corpus in, Parquet shards of a teacher's labels out.

``config``         the fields of a ``label.toml``
``corpus/``        source files to requests: read, tokenise, cut into windows, key
``teacher_model/`` the teacher's folder: identity, vocabulary, weights digest
``label_head/``    logits to labels
``teachers/``      token ids to labels, by vLLM, transformers or a remote server
``units/``         requests to units of label rows
``quality/``       fidelity and parity gates
``supervision/``   keeps an engine alive and finds rows that crash it
``run/``           the whole job on Ray: pipeline, ledger, accounts, summary
``planning/``      ``label --plan``: tokens, bytes and hours before a job

Imports go up this list, never down; nothing here imports trainer.
"""

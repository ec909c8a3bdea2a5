"""What both stages agree on: the label record, label sets, views, keys and errors.

``errors``        every error that a user can meet
``config``        TOML files to checked models, and back
``spec``          everything that makes a label mean what it means, and its fingerprint
``keys``          identities of rows and units
``record/``       the label record: columns, rows in memory, invariants, rounding
``storage/``      files behind one fsspec URL; the two atomic ways to create one
``label_set/``    a folder of committed units: shards, manifests, rosters
``views/``        rows of label sets chosen for training
``maintenance/``  verify, list, sample, collect garbage: for the command line alone

Nothing here imports torch, Ray or vLLM. Imports go up this list, never down.
"""

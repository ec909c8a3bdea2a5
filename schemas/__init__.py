"""The contract between labelling and training: records, label sets, views, keys and errors.

``vocabulary``    comparison of tokenizers' vocabularies
``errors``        the exceptions shown to users
``config``        TOML files to validated models, and back
``spec``          everything that defines the meaning of a label, and its fingerprint
``keys``          identities of rows and units
``record/``       the label record: columns, rows in memory, invariants, rounding
``storage/``      files behind one fsspec URL, written atomically
``label_set/``    a folder of committed units: shards, manifests, rosters
``views/``        rows of label sets selected for training
``maintenance/``  verify, list, sample and collect garbage; for the command line only

Nothing here imports torch, Ray or vLLM. Modules import from rooms above them in this list only.
"""

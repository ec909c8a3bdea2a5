"""The contract between labelling and training: records, label sets, views, keys and errors.

``vocabulary``    comparison of tokenizers' vocabularies
``errors``        the exceptions shown to users
``config``        loads TOML files as validated models, and writes them back
``spec``          the settings that define what a label means, and their fingerprint
``keys``          identities of rows and units
``record/``       the label record: columns, rows in memory, invariants, rounding
``storage/``      files behind one fsspec URL, written atomically
``label_set/``    folders of committed units: shards, manifests, rosters
``views/``        rows of label sets selected for training
``maintenance/``  verify, list, sample and garbage-collect label sets; command line only

Nothing here imports torch, Ray or vLLM. Modules import only from entries above them in this list.
"""

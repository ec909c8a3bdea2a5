"""What both stages agree on: the label record, label sets, rosters, views, keys and errors.

The way through the package:

``errors``     every error that a user can meet
``config``     TOML files into checked models, and back
``spec``       what makes a label mean what it means, and its fingerprint
``record``     the label record: its columns, its rows in memory, its invariants
``keys``       identities of rows and units
``storage``    files behind one URL, and the two atomic ways to create one
``shards``     rows to Parquet and back, every byte checked
``manifest``   the commit of one unit
``label_set``  a folder of committed units
``roster``     what a run read, and its accounts
``view``       rows of label sets chosen for training
``view_make``  views by choice: filter (``view_filter``), hold out, mix, sample
``verify``     shows that a label set is what its manifests say, or lists what is not
``garbage``    what no manifest names
``listing``    every label set below a URL
``sample``     a seeded sample of labels, for people to look at
``export_labels``  labels in the layouts of other trainers

Nothing here imports torch, Ray or vLLM.
"""

"""Labelling: a corpus goes in, shards of a teacher's labels come out.

The way through the package:

``config``     what a ``label.toml`` may say
``sources``    the corpus, cut into pieces and read row by row, each row known by its place
``text_rows``  a source row becomes documents of token ids with the spans to be labelled
``windows``    a document longer than the context becomes overlapping windows
``requests``   one window is one request; the keys that make labels reusable
``ledger``     each distinct row is labelled once in a run
``teachers``   the engines that label
``pipeline``   all of these as one Ray Data job
``job``        the whole run: checks, pipeline, accounts, view, summary
"""

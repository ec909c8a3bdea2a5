"""Labelling: a corpus goes in, shards of a teacher's labels come out.

The way through the package:

``config``                             what a ``label.toml`` may say
``corpus_files``, ``sources``          the corpus, cut into pieces
``lines``, ``readers``                 a piece read row by row, each row known by its place
``text_rows``, ``chat``                a row becomes a document: token ids and the spans to be labelled
``windows``                            a document longer than the context becomes several windows
``requests``                           a window becomes a request, under a key that makes labels reusable
``pieces``                             the work of one tokenising task: all of the above
``teachers``, ``identity``             the engines that label, and what makes them the same teacher
``unit_labels``, ``assemble``          what a teacher makes of requests
``survivor``, ``attempts``             rows that kill engines are found and set aside
``units``                              the work of one teacher call: a committed unit
``ledger``, ``progress``               each row once in a run; how far the run is
``cluster_session``, ``pipeline``      all of these as one Ray Data job
``job``, ``accounts``                  the whole run: checks, pipeline, accounts, view, summary
"""

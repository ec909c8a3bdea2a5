"""Labelled shards to a student: reads views of label sets, trains under DeepSpeed and Ray Train.

``config`` says what a run is, ``plan`` and ``packing`` say in which order rows are read, ``loader``
reads them, ``loop`` trains, ``checkpoint`` and ``export`` keep what came of it, and ``launch`` runs
it all on a cluster or on this machine. Nothing heavy is imported here.
"""

"""Estimates a labelling job before it runs: `tutelage label --plan`.

Samples the corpus, calibrates the teacher on a few units and states ranges. Writes nothing that a
job reads.
"""

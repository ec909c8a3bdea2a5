"""Rows of label sets chosen for training: by roster, filter, split, mixture or sample."""

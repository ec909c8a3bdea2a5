"""Rows of label sets selected for training: by roster, filter, split, mixture or sample."""

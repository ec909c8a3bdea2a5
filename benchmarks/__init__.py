"""Measurements behind the claims: one module each, which prints a table and writes JSON."""

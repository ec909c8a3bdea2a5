"""Files behind one fsspec URL: atomic creation, retries, and drivers' errors in one form.

Knows bytes and paths only; what a file means belongs to other rooms.
"""

"""Files behind one fsspec URL: atomic writes, retries, and one form for the errors of drivers.

Knows bytes and paths only; the meaning of files belongs to other rooms.
"""

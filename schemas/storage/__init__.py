"""Files behind one fsspec URL: atomic writes, retries, and uniform driver errors.

Knows only bytes and paths; other rooms give files their meaning.
"""

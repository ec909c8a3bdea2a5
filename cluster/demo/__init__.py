"""The demo: Python's standard library, a small teacher, two students with different losses."""

"""The demo: the running Python's own standard library, a small teacher, two equal students."""

"""Students against their teacher and each other on held-out rows."""

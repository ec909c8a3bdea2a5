"""What a person sees of a long command: progress, and numbers and tables as text.

Knows nothing of labels or training; every command line and job of the project prints through here.
"""

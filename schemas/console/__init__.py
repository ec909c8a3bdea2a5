"""Output for people: progress of long commands; durations, sizes and tables as text.

Independent of labels and training, so that every command and job of the project can use it.
"""

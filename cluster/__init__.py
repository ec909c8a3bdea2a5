"""Entry points: the command line, job submission, label set tools, the demo."""

"""Entry points: the command line, job submission and the demo. Imports the other packages late."""

"""Reports a run in progress: learning curve, row log, status, external trackers."""

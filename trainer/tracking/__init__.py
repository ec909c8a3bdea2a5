"""What a run reports while it trains: learning curve, row log, progress, external trackers."""

"""Training that says how much of one row it can give away: what it costs, in epsilon and delta."""

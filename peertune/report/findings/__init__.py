"""What went wrong in a run, in words."""

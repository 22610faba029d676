"""What a run leaves behind, and who else is told of it."""

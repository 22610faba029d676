"""Grids of runs: which are one stack, and their processes, on this machine or in a queue."""

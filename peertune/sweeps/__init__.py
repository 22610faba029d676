"""Grids of runs, each a process, on this machine or in a queue."""

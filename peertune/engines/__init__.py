"""Engines: they run a job's rounds and differ only in how adapters are exchanged."""

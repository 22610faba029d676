"""Stacks of adapters over one frozen base, and the bridge to PEFT."""

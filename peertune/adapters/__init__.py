"""Stacks of adapters over one frozen base, and the bridge to PEFT."""

from peertune.deferring import put_off

with put_off():  # all else of the package takes from these
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401

"""Imported by the process that peers are forked from: what makes a first run slow is done once, here."""

import gc

from peertune.cli.common import importing

with importing():
    import peertune.api.peering
    import peertune.cli
    import peertune.engines.distributed
    import peertune.engines.peer  # noqa: F401
    from peertune.assembly.build import build
    from peertune.recipe import load_recipe

build(load_recipe("digits-demo", ["clients=2", "rounds=1", "device=cpu"]), [0])
gc.freeze()  # what is forked looks for no garbage in it, and need not copy it for that

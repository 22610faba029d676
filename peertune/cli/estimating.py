"""What `run --dry-run` says."""

from typing import TYPE_CHECKING

from peertune.cli.common import duration, print_json

if TYPE_CHECKING:
    from peertune.planning.memory_plan import Plan


def print_estimate(recipe: str, overrides: list[str], as_json: bool) -> None:
    """Plan the memory before anything is loaded, refuse what can't fit, and try the rest where its device is here."""
    from dataclasses import asdict

    from peertune.errors import ModelError
    from peertune.models.load import pick_device
    from peertune.planning.memory_plan import check_fits, plan
    from peertune.planning.trial import estimate, trial
    from peertune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    planned = plan(loaded)
    if not as_json:
        _print_plan(planned)
    check_fits(loaded, planned)
    try:
        pick_device(loaded.device)
    except ModelError as error:
        if as_json:
            print_json({"plan": asdict(planned), "trial": None})
        else:
            print(f"time    unknown; {error}")
        return
    measured = trial(loaded)
    found = estimate(loaded, measured)
    if as_json:
        print_json({**asdict(found), "plan": asdict(planned), "trial": asdict(measured)})
        return
    print(f"        {found.memory_bytes / 2**20:,.0f} MiB as measured in a few steps")
    print(f"time    {duration(found.seconds)}, of it {duration(measured.start_s)} to start")
    print(f"sent    {found.sent_bytes / 1e6:,.3f} MB by all clients together")


def _print_plan(planned: "Plan") -> None:
    there = "" if planned.available is None else f" of {planned.available / 2**20:,.0f} MiB"
    print(
        f"memory  {planned.total / 2**20:,.0f} MiB{there} on {planned.device}: {planned.dtype}, "
        f"{planned.clients_per_pass} clients and about {planned.tokens_per_pass:,} tokens at a time"
    )
    parts = {
        "base": "the base",
        "adapters": "adapters of all clients",
        "moments": "moments of the optimiser",
        "under_way": "what is computed ahead, and sent",
        "starts": "what a round began with",
        "process": "the process itself",
        "gradients": "gradients",
        "activations": "activations",
        "holes": "holes that the heap has between them",
        "mixing": "in the place of these three: measuring a round",
        "evaluation": "in the place of these three: evaluation",
    }
    for part, words in parts.items():
        if size := getattr(planned, part):
            print(f"        {size / 2**20:>8,.0f} MiB  {words}")

"""The command `cache`."""

from enum import StrEnum
from typing import Annotated

import typer

from peertune.cli.common import AsJson, print_json


class Wish(StrEnum):
    """What is to be done with the cache."""

    SHOW = "show"
    CLEAR = "clear"


def cache(
    wish: Annotated[Wish, typer.Argument(help="Show what is kept between runs, or take all of it out.")] = Wish.SHOW,
    as_json: AsJson = False,
) -> None:
    """Show or clear what is kept between runs: the tokens of rows.

    It is in the folder PEERTUNE_CACHE of the environment, which may be empty to keep nothing; else in peertune in
    XDG_CACHE_HOME, or in ~/.cache. A peer's rows are only kept where its recipe says keep_tokens: true.

    Example:

      peertune cache clear
    """
    from datetime import datetime

    from peertune import cache as kept

    held, place = kept.clear() if wish == Wish.CLEAR else kept.entries(), kept.folder()
    size = sum(entry.size_bytes for entry in held)
    if as_json:
        facts = [{"name": x.file.name, "bytes": x.size_bytes, "used_at": x.used_at} for x in held]
        print_json({"folder": place and str(place), "bytes": size, "most_bytes": kept.MAX_BYTES, "entries": facts})
        return
    if place is None:
        print(f"nothing is kept: {kept.VARIABLE} is empty")
        return
    done = "cleared of" if wish == Wish.CLEAR else f"of {kept.MAX_BYTES / 1e6:,.0f} MB at most"
    print(f"{place}: {done} {size / 1e6:,.1f} MB in {len(held)} entries")
    for entry in held if wish == Wish.SHOW else ():
        print(
            f"  {entry.file.name}  {entry.size_bytes / 1e6:.1f} MB, used {datetime.fromtimestamp(entry.used_at):%F %R}"
        )

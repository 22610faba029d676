"""Torchrun's agent, whose ranks are forked from a warm process: it may start them again and again in little time.

`main`, of RANKS RESTARTS WORD…, is `torchrun --standalone --nproc-per-node RANKS --max-restarts RESTARTS
-m peertune WORD…`, and each rank leaves its process's number in `RESTART-RANK.pid`.
"""

import os
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def rank(*words: str) -> None:
    """Run the command line as torchrun's ranks do."""
    from peertune.cli import _main

    sys.argv = ["peertune", *words]
    written = Path(f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}.pid")
    written.with_suffix(".tmp").write_text(str(os.getpid()))
    written.with_suffix(".tmp").rename(written)
    try:
        _main()
    except SystemExit as end:
        if end.code:
            os._exit(2)  # to the agent a function that returns has done well


def main() -> None:
    """Start the ranks, again where one fails, from where this process was forked."""
    ranks, restarts, *words = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(ranks),
        run_id="often",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=int(restarts),
        start_method="forkserver",
    )
    elastic_launch(config, rank)(*words)

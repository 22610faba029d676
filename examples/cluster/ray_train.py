"""One run over the workers of a Ray cluster, a process beside each.

    python examples/cluster/ray_train.py --workers 4 --gpu RECIPE [KEY=VALUE]... --out DIR

DIR lies on a disk that all machines share. The first start begins the run; another with the same words goes on with it.
docs/cluster.md says more.
"""

import argparse
import os
import socket
import subprocess
import sys
from typing import Any

import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(config: dict[str, Any]) -> None:
    """Run the process of this worker, which Ray has told its rank and where rank 0 is.

    It is a process of its own because it opens a process group, which Ray's worker already has, and catches signals,
    which a thread can't: a worker's function runs in one. Ray's group only serves to agree on a port.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = [free.getsockname()[1]]
    dist.broadcast_object_list(port)
    place = {"MASTER_PORT": str(port[0]), "TORCHELASTIC_RUN_ID": "ray"}  # a run begun under this name is gone on with
    code = subprocess.call([sys.executable, "-m", "peertune", "run", *config["words"]], env=os.environ | place)
    if code:
        raise RuntimeError(f"peertune run ended with exit code {code}; its own words stand above")


def main() -> None:
    """Read the command line, and start the workers."""
    parser = argparse.ArgumentParser(description="One run over the workers of a Ray cluster.")
    parser.add_argument("--workers", type=int, required=True, help="how many processes")
    parser.add_argument("--gpu", action="store_true", help="with a GPU each")
    parser.add_argument("--cpus", type=int, default=1, help="with so many cores each")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what follows `peertune run`, with absolute paths")
    asked = parser.parse_args()
    TorchTrainer(
        work,
        train_loop_config={"words": asked.words},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=asked.workers, use_gpu=asked.gpu, resources_per_worker={"CPU": asked.cpus}
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()

"""`python -m benchmarks [PART …] [--out FOLDER]`: measure, print a table, and write the figures as JSON.

With `--old COMMIT` parts that can be are measured of that commit's package and of this one, in turn; none is written.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from benchmarks import against
from benchmarks.measure import machine
from benchmarks.table import compared, table
from peertune.errors import PeertuneError

PARTS = (
    "demo",
    "start",
    "step",
    "private",
    "growth",
    "cluster",
    "scale",
    "memory",
    "decaf",
    "evaluation",
    "stack",
    "language",
    "wire",
    "soak",
    "pushing",
    "bound",
    "rules",
    "gpu",
    "protocol",
)

LONG = {"bound"}
"""What takes many hours, and runs only where it is named."""


def main() -> None:
    """Run each part in a process of its own, or, within such a process, one part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all but {', '.join(LONG)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--old", metavar="COMMIT", help="compare with this commit's package")
    parser.add_argument("--turns", type=int, default=5, help="of each of the two")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"{part!r} is no part; choose from {', '.join(PARTS)}")
    if options.here:
        (part,) = options.parts
        try:
            print(json.dumps([figure.json() for figure in import_module(f"benchmarks.{part}").run()]))
        except PeertuneError as error:
            print(f"benchmarks {part}: {error}; set SST2=FOLDER to read SST-2 from a folder", file=sys.stderr)
            sys.exit(2)
        return
    if options.old:
        parts = against.parts_of_two(options.parts or [part for part in PARTS if part not in LONG])
        if left := set(options.parts).difference(parts):
            parser.error(f"{', '.join(sorted(left))}: can't be measured of two builds")
        for what, figures in against.compare(options.old, parts, options.turns):
            print(f"{what}\n\n{compared(figures)}\n", flush=True)
        return
    found = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{found.get('gpu', found['cpu'])} {found['cores']} cores".lower()).strip("-")
    path = options.out / f"{datetime.date.today()}-{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {"commits": {}, "figures": {}}
    results |= {"date": str(datetime.date.today()), "machine": found}
    for part in options.parts or [part for part in PARTS if part not in LONG]:
        print(f"{part} …", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks", "--here", part]
        process = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if process.returncode:
            sys.exit(process.returncode)
        results["commits"][part] = _commit()
        results["figures"][part] = json.loads(process.stdout.splitlines()[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(table(results["figures"][part]), flush=True)
    print(f"written to {path}", file=sys.stderr)


def _commit() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return git.stdout.strip()


if __name__ == "__main__":
    main()

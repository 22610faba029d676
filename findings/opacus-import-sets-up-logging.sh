#!/usr/bin/env bash
# Importing Opacus sets up the root logger, so that a program's own `logging.basicConfig` after it does nothing.
#
# Some of opacus 1.6.0's modules call `logging.basicConfig` where they are imported. `basicConfig` does nothing where the
# root logger has a handler. So a trainer that imports its libraries first and then sets its level and its file logs
# neither: below, the line at INFO is lost, and the file is not made. With `force=True`, or set up before the import, it
# is as asked.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 opacus==1.6.0 2> /dev/null

said=$(cd "$there" && "$there/env/bin/python" -W ignore - 2> /dev/null <<'PY'
import logging
from importlib.metadata import version
from pathlib import Path

print("handlers before:", len(logging.root.handlers))
import opacus

print("opacus", version("opacus"), "handlers after:", len(logging.root.handlers))
logging.basicConfig(filename="train.log", level=logging.INFO)
logging.info("epoch 1")
print("train.log:", Path("train.log").exists())
logging.basicConfig(filename="train.log", level=logging.INFO, force=True)
logging.info("epoch 2")
print("with force:", Path("train.log").read_text().strip())
PY
)
echo "$said"
[ "$said" = "handlers before: 0
opacus 1.6.0 handlers after: 1
train.log: False
with force: INFO:root:epoch 2" ] || { echo "this has changed" >&2; exit 1; }

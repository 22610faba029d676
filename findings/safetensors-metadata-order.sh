#!/usr/bin/env bash
# A safetensors file with two keys of metadata has other bytes each time that it is written.
#
# safetensors sorts tensors, so the same tensors give the same file, and digests of such files are used as names of
# weights, as cache keys and to compare machines. The keys of `metadata` are not sorted: safetensors 0.8.0 writes them
# in an order that changes from one call to the next, in one process, with the same arguments. With one key (such as
# `{"format": "pt"}`, which most writers put there) this never shows. With two, equal contents have several digests.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there"
"$there/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 2> /dev/null

said=$("$there/bin/python" - <<'PY'
from hashlib import sha256

import numpy as np
import safetensors
from safetensors.numpy import load, save

tensors = {"b": np.ones(3), "a": np.zeros(2)}
print("safetensors", safetensors.__version__)
for metadata in ({"format": "np"}, {"format": "np", "base": "tiny"}):
    files = [save(tensors, metadata=metadata) for _ in range(200)]
    assert all((load(file)["b"] == 1).all() for file in files)
    digests = {sha256(file).digest() for file in files}
    print(f"{len(metadata)} of metadata: {'one digest' if len(digests) == 1 else 'several digests'}")
PY
)
echo "$said"
[ "$said" = "safetensors 0.8.0
1 of metadata: one digest
2 of metadata: several digests" ] || { echo "this has changed" >&2; exit 1; }

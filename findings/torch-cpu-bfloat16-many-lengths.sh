#!/usr/bin/env bash
# bfloat16 on a CPU: a product of a new shape costs 20 times one seen before, and .7 MB; past 1,024 shapes every one is new.
#
# PyTorch 2.13.0 gives bfloat16 products to oneDNN, which makes code for each shape that it meets: 1 ms for a product
# that takes .05 ms, and .7 MB that stay in memory, whatever the size of the tensors. It keeps 1,024 of them, so .7 GB, and
# drops the one unused for longest. Batches of texts have another number of tokens each. A model that meets 800 numbers of rows pays once; one that meets 1,300 in turn pays at every product,
# for ever. Each weight's shape, and each of its two products in the backward pass, counts as well, so a model with four
# shapes of weights gets there with 85 lengths. float32 does not do it. Lengths rounded up to a few sizes avoid it, and
# so does ONEDNN_PRIMITIVE_CACHE_CAPACITY, set before the process starts.
# Seen on an Intel Xeon with AMX; a processor for which PyTorch has no bfloat16 products of oneDNN's is told so.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 2> /dev/null

cat > "$there/lengths.py" <<'PY'
import statistics
import sys
import time
import warnings

warnings.simplefilter("ignore")  # torch says that there is no NumPy
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    print("no bfloat16 products here")
    sys.exit()
dtype, lengths = getattr(torch, sys.argv[1]), int(sys.argv[2])
weight = torch.ones(64, 64, dtype=dtype)
torch.ones(8, 64, dtype=dtype) @ weight


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


before, middle = resident(), []
for _ in range(3):
    taken = []
    for rows in range(64, 64 + lengths):
        x = torch.ones(rows, 64, dtype=dtype)
        begun = time.process_time()
        x @ weight
        taken.append(time.process_time() - begun)
    middle.append(1000 * statistics.median(taken))
    if len(middle) == 1:
        each = (resident() - before) / min(lengths, 1000) / 1e6
print("%.2f MB a shape; first: %.3f ms, third: %.3f ms, third over first: %.2f" % (each, *middle[::2], middle[2] / middle[0]))
PY

try() {  # WHAT AT_LEAST AT_MOST MB [SETTING]: the third meeting of all lengths over the first, and MB of a shape at least
  said=$(env ${5:-} "$there/env/bin/python" "$there/lengths.py" ${1%:*} ${1#*:})
  echo "torch 2.13.0, ${1%:*}, ${1#*:} lengths${5:+, $5}: $said"
  [ "$said" = "no bfloat16 products here" ] ||
    awk -v x="${said##* }" -v low="$2" -v high="$3" -v mb="${said%% *}" -v least="$4" \
      'BEGIN { exit !(x >= low && x <= high && mb >= least) }' ||
    { echo "this has changed" >&2; exit 1; }
}
try bfloat16:800 0 .3 .3
try bfloat16:1300 .6 3 .3
try bfloat16:1300 0 .3 .3 ONEDNN_PRIMITIVE_CACHE_CAPACITY=4096
try float32:1300 .3 3 0

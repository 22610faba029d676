#!/usr/bin/env bash
# `import bitsandbytes` asks a hub for a compiled kernel, on some processors and in some environments only.
#
# bitsandbytes 0.50.2 replaces its 4-bit product on the CPU by a compiled one from kernels-community on the Hugging Face
# hub. It does so while it is imported, if the processor has AVX512-BF16 and the package `kernels` (here 0.17.2), which
# transformers users often have, is installed. So one environment computes with different code on two machines, one
# import goes to the network and another doesn't, and where the hub can't be reached all goes on with another kernel
# after a line in the log. HF_HUB_OFFLINE=1 keeps it from asking. Nothing but the import is needed, and nothing in the
# package's own binary is missing.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 kernels==0.17.2 2> /dev/null

cat > "$there/ask.py" <<'PY'
import socket
import sys

asked = []


def nowhere(host, *rest, **more):
    asked.append(host)
    raise OSError("there is no network here")


socket.getaddrinfo = nowhere
import bitsandbytes  # noqa: E402

print(bitsandbytes.__version__, "asked for", *sorted(set(asked)) or ["nobody"], file=sys.stdout)
PY

for offline in 0 1; do
  said=$(HF_HOME="$there/home" HF_HUB_OFFLINE=$offline "$there/env/bin/python" "$there/ask.py" 2> /dev/null | tail -1)
  whom=nobody
  if [ $offline = 0 ] && grep -q avx512_bf16 /proc/cpuinfo; then whom=huggingface.co; fi
  echo "$said (HF_HUB_OFFLINE=$offline, AVX512-BF16: $(grep -qc avx512_bf16 /proc/cpuinfo && echo yes || echo no))"
  [ "$said" = "0.50.2 asked for $whom" ] || { echo "this has changed" >&2; exit 1; }
done

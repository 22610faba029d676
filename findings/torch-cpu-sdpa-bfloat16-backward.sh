#!/usr/bin/env bash
# Training attention in bfloat16 on a CPU: PyTorch's fused kernel takes several times as long as its own float32.
#
# On short rows (16 to 64 tokens, as of most sentences) torch 2.13.0's scaled_dot_product_attention is about as fast in
# bfloat16 as in float32 going forward. Its backward pass is another matter: forward and backward together take 5 to 16
# times as long as in float32, and as three plain operations in bfloat16 (product, softmax, product). So a model that is
# cast to bfloat16 to train faster on a processor that has bfloat16 products trains slower, attention alone outweighing
# everything gained. transformers picks this kernel by default (`attn_implementation="sdpa"`); "eager" avoids it.
# At 512 tokens the fused kernel wins again.
# Seen on an Intel Xeon with AMX; asserted where PyTorch has bfloat16 products of oneDNN's.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 2> /dev/null

cat > "$there/attend.py" <<'PY'
import statistics
import sys
import time
import warnings

warnings.simplefilter("ignore")  # torch says that there is no NumPy
import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as fused  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)


def plain(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def trained(attend, given):
    torch.autograd.grad(attend(*given).sum(), given)


def asked(attend, given):
    with torch.no_grad():
        attend(*given)


if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    print("no bfloat16 products here")
    sys.exit()
for tokens in (16, 32, 64):
    whole = [torch.randn(4096 // tokens, 12, tokens, 32) for _ in range(3)]  # 4,096 tokens, 12 heads of 32 channels
    given = {dtype: [x.to(dtype).requires_grad_() for x in whole] for dtype in (torch.float32, torch.bfloat16)}
    times = {}
    for turn in range(8):
        for attend in (fused, plain):
            for dtype, qkv in given.items():
                for what in (asked, trained):
                    begun = time.process_time()
                    what(attend, qkv)
                    times.setdefault((attend, dtype, what), []).append(time.process_time() - begun)
    ms = {key: 1000 * statistics.median(taken[1:]) for key, taken in times.items()}
    half, single = ms[fused, torch.bfloat16, trained], ms[fused, torch.float32, trained]
    by_hand, forward = ms[plain, torch.bfloat16, trained], ms[fused, torch.bfloat16, asked]
    print(
        f"{tokens} tokens, forward and backward: fused bfloat16 {half:.0f} ms, fused float32 {single:.0f} ms, "
        f"plain bfloat16 {by_hand:.0f} ms; fused bfloat16 forward alone {forward:.0f} ms"
    )
    if not (half > 3 * single and half > 2.5 * by_hand and half > 5 * forward):
        sys.exit("this has changed")
PY
"$there/env/bin/python" "$there/attend.py" | sed 's/^/torch 2.13.0, /'

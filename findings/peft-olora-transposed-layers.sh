#!/usr/bin/env bash
# PEFT's OLoRA start changes what GPT-2 answers, without a word, on layers that are square.
#
# OLoRA takes the first parts of each layer's QR decomposition out of the layer and begins with them as the adapter, so
# that a model answers as before until it is trained. GPT-2 keeps its weights transposed (`Conv1D`, `fan_in_fan_out`).
# With peft 0.21.2, PiSSA's start turns them round first and OLoRA's does not: of a square layer, such as
# `attn.c_proj`, the transposed product is taken out, and the answers are others from the first; on a layer of other
# sizes, such as `attn.c_attn`, the model raises an error when it is first used.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 2> /dev/null

cat > "$there/begin.py" <<'PY'
import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

small = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 11, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
words = torch.tensor([[1, 2, 3, 4]])
for layer in ("attn.c_proj", "attn.c_attn"):
    for init in ("pissa", "olora"):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**small)).eval()
        before = model(input_ids=words).logits
        config = peft.LoraConfig(r=4, target_modules=[layer], init_lora_weights=init, fan_in_fan_out=True)
        adapted = peft.get_peft_model(model, config).eval()
        try:
            apart = float((adapted(input_ids=words).logits - before).abs().max() / before.abs().max())
        except RuntimeError as error:
            print(f"{layer} {init}: {error}")
        else:
            print(f"{layer} {init}: the answers {'stay' if apart < 1e-5 else 'move' if apart > 0.01 else 'move a little'}")
PY

said=$(HF_HUB_OFFLINE=1 "$there/env/bin/python" "$there/begin.py" 2> /dev/null)
echo "$said"
[ "$said" = 'attn.c_proj pissa: the answers stay
attn.c_proj olora: the answers move
attn.c_attn pissa: the answers stay
attn.c_attn olora: mat1 and mat2 shapes cannot be multiplied (4x16 and 48x4)' ] || { echo "this has changed" >&2; exit 1; }

#!/usr/bin/env bash
# PEFT's `layers_to_transform` chooses among layers that `target_modules` names by the ends of their names, and is
# passed over, without a word, for layers that are named whole.
#
# With peft 0.21.2, `target_modules=["c_attn"], layers_to_transform=[1]` adapts layer 1 of GPT-2. With the same layers
# written out, as tools do that list what a pattern came to, and as adapters say whose pattern was resolved, all of them
# are adapted. `adapter_config.json` then says `layers_to_transform: [1]` beside weights of every layer. Names that lack
# nothing but the first part, `h.0.attn.c_attn` for `transformer.h.0.attn.c_attn`, are ends of names, and the numbers
# count.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 2> /dev/null

cat > "$there/adapt.py" <<'PY'
import json
import sys

import peft
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

small = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
whole = [f"transformer.h.{layer}.attn.c_attn" for layer in range(3)]
for called, names in {"end": ["c_attn"], "whole": whole, "nearly": [x.removeprefix("transformer.") for x in whole]}.items():
    config = peft.LoraConfig(target_modules=names, layers_to_transform=[1], fan_in_fan_out=True)
    model = peft.get_peft_model(GPT2LMHeadModel(GPT2Config(**small)), config)
    model.save_pretrained(sys.argv[1])
    with safe_open(f"{sys.argv[1]}/adapter_model.safetensors", "pt") as file:
        layers = sorted({int(name.split(".h.")[1].split(".")[0]) for name in file.keys()})
    with open(f"{sys.argv[1]}/adapter_config.json") as file:
        said = json.load(file)["layers_to_transform"]
    print(f"{called}: says {said}, adapts {layers}")
PY

said=$(HF_HUB_OFFLINE=1 "$there/env/bin/python" "$there/adapt.py" "$there/adapter" 2> /dev/null)
echo "$said"
[ "$said" = 'end: says [1], adapts [1]
whole: says [1], adapts [0, 1, 2]
nearly: says [1], adapts [1]' ] || { echo "this has changed" >&2; exit 1; }

#!/usr/bin/env bash
# PEFT saves an adapter whose scales, read again, are others: it sorts the keys of alpha_pattern, of which the first counts.
#
# Of several keys of `rank_pattern` or `alpha_pattern` that match a layer PEFT takes the first. With peft 0.21.2
# `save_pretrained` writes the configuration with sorted keys, so that another key may come to be first. Of a
# `rank_pattern` the factors then have other shapes than the file's, and PEFT says so. Of an `alpha_pattern` it says
# nothing: the model answers otherwise.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 2> /dev/null

cat > "$there/save.py" <<'PY'
import sys

import peft
import torch


def scales(model: torch.nn.Module) -> list[float]:
    return [layer.scaling["default"] for layer in model.modules() if hasattr(layer, "scaling")]


keys = {"query": 4, ".*": 16}
for pattern in (keys, dict(sorted(keys.items()))):
    base = torch.nn.ModuleDict({"query": torch.nn.Linear(8, 8), "value": torch.nn.Linear(8, 8)})
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"], alpha_pattern=pattern)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(sys.argv[1])
    base = torch.nn.ModuleDict({"query": torch.nn.Linear(8, 8), "value": torch.nn.Linear(8, 8)})
    print(scales(model), "saved, and read again", scales(peft.PeftModel.from_pretrained(base, sys.argv[1])))
PY

said=$(HF_HUB_OFFLINE=1 "$there/env/bin/python" "$there/save.py" "$there/adapter" 2> /dev/null)
echo "$said"
[ "$said" = '[0.5, 2.0] saved, and read again [2.0, 2.0]
[2.0, 2.0] saved, and read again [2.0, 2.0]' ] || { echo "this has changed" >&2; exit 1; }

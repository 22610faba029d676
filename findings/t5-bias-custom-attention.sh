#!/usr/bin/env bash
# T5 with an attention function of one's own, registered as the documentation shows, computes without its positions.
#
# transformers 5.23.0 hands a registered attention function (`AttentionInterface.register`) the query, key, value and
# one mask that is to be added to the scores. For T5 that mask holds padding only: the relative position bias, the one
# thing by which T5 knows where a token stands, comes as a further keyword, `position_bias`. A function with the
# signature of the documentation (`attention_mask, scaling, dropout, **kwargs`) swallows it. Nothing is raised and
# nothing warned of, and a BERT run on the same function is right.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there"
"$there/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 2> /dev/null

said=$("$there/bin/python" - 2> /dev/null <<'PY'
import torch
import transformers
from transformers import AttentionInterface, BertConfig, BertModel, T5Config, T5EncoderModel


def plain(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """softmax(Q K^T * scaling + mask) V, as eager attention is."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain)
torch.manual_seed(0)
t5 = T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()
bert = BertModel(
    BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
).eval()
ids = torch.randint(2, 50, (1, 12))
print("transformers", transformers.__version__)
for name, model in (("bert", bert), ("t5", t5)):
    found = {}
    for attention in ("eager", "plain"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            found[attention] = model(ids).last_hidden_state
    same = torch.allclose(found["eager"], found["plain"], atol=1e-5)
    print(f"{name}: {'the same as eager' if same else 'not the same as eager, and no error'}")
PY
)
echo "$said"
[ "$said" = "transformers 5.23.0
bert: the same as eager
t5: not the same as eager, and no error" ] || { echo "this has changed" >&2; exit 1; }

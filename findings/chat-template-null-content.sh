#!/usr/bin/env bash
# A chat template can ask `content is none`, and in transformers 5 the answer is always no.
#
# Assistants' messages with tool calls have `content: null` in most data sets, and many published templates branch on
# `message.content is none`. transformers 4.57.1 renders such a message as it is. transformers 5.23.0 first removes
# every key of a message whose value is null, so the template sees an undefined name: `is none` is false, `is defined`
# is false, and `is not none` is true. The same file of messages, with the same template, becomes other training text,
# without a word. Servers that render the template with Jinja themselves still see null.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
for version in 4.57.1 5.23.0; do
  python3 -m venv "$there/$version"
  "$there/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version" jinja2==3.1.6 2> /dev/null
done

cat > "$there/render.py" <<'PY'
import transformers
from tokenizers import Tokenizer, models

tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is none %}CALLS {{ m.tool_calls[0].function.name }}"
    "{% else %}SAYS '{{ m.content }}'{% endif %}{% endfor %}"
)
call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
print(transformers.__version__, tokenizer.apply_chat_template(messages, tokenize=False))
PY

said=$(for version in 4.57.1 5.23.0; do "$there/$version/bin/python" "$there/render.py" 2> /dev/null; done)
echo "$said"
[ "$said" = "4.57.1 assistant: CALLS weather
5.23.0 assistant: SAYS ''" ] || { echo "this has changed" >&2; exit 1; }

"""What reaches a chat template beside the messages, and what is refused by its name."""

import json
from typing import Any

import numpy as np
import pytest
from speaking import CHAT, make_tokenizer

from peertune.data.completions import encode_completions, encode_prompts
from peertune.errors import DataError
from peertune.types import Split

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "string"}}}}]
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}|{% endif %}{% for d in documents or [] %}<{{ d.text }}>{% endfor %}"
WITH_TOOLS += "{{ style | default('plain') }}|" + CHAT


def said(chat: Any, rows: int = 1, **columns: Any) -> list[str]:
    """The whole texts of rows, and whether their prompts begin in the same way."""
    given = {"messages": [MESSAGES] * rows, **columns}
    tokenizer, split = make_tokenizer(chat), Split(given, np.zeros(rows))
    encoded = encode_completions(tokenizer, split, ("messages",), 400)
    ends = np.cumsum(encoded.lengths)[:-1]
    texts = [tokenizer.decode(ids) for ids in np.split(encoded.tokens["input_ids"].numpy(), ends)]
    prompts, _ = encode_prompts(tokenizer, split, ("messages",), 400)
    for text, prompt in zip(texts, prompts, strict=True):
        assert text.startswith(tokenizer.decode(prompt))
    return texts


def refusal(chat: Any, **columns: Any) -> str:
    with pytest.raises(DataError) as error:
        said(chat, **columns)
    return str(error.value)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["a list", "JSON"])
def test_tools_and_documents_reach_the_template(tools: Any) -> None:
    texts = said(WITH_TOOLS, 3, tools=[tools, None, []], documents=[None, [{"text": "d1"}, {"text": "d2"}], None])
    written = json.dumps(TOOLS)
    assert texts[0].startswith(f"{written}|plain|<s>[user] hi")
    assert texts[1].startswith("<d1><d2>plain|<s>[user] hi")
    assert texts[2].startswith("plain|<s>[user] hi")


def test_nulls_that_a_table_put_among_tools_are_left_out() -> None:
    parameters = {"city": {"type": "string", "enum": None}, "year": None}
    table = [{"type": "function", "function": {"name": "f", "parameters": parameters}, "strict": None}]
    assert said(WITH_TOOLS, tools=[table]) == said(WITH_TOOLS, tools=[TOOLS])


def test_other_variables_come_from_columns_of_their_names_or_from_chat_template_kwargs() -> None:
    assert said(WITH_TOOLS, 2, style=["formal", None])[0].startswith("formal|<s>")
    assert said(WITH_TOOLS, 2, chat_template_kwargs=[{"style": "brief"}, None])[0].startswith("brief|<s>")
    assert said(WITH_TOOLS, role=["other"], content=["other"]) == said(WITH_TOOLS)  # which it looks up in messages


def test_of_several_templates_the_one_for_tools_writes_them() -> None:
    chat = {"default": CHAT, "tool_use": WITH_TOOLS}
    texts = said(chat, 2, tools=[TOOLS, None])
    assert texts[0].startswith('[{"type"')
    assert texts[1].startswith("<s>[user] hi")


CALLING = [
    MESSAGES[0],
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "tool", "content": "3"},
    MESSAGES[1],
]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"tools": [TOOLS]},
            "task: row 0: has tools, and the base's chat template has no place for that; leave it out",
        ),
        ({"documents": [[{"text": "d"}]]}, "task: row 0: has documents, and the base's chat template has no place"),
        ({"chat_template_kwargs": [{"thinking": True}]}, "task: row 0: has thinking, and the base's chat template"),
        ({"chat_template_kwargs": ["thinking"]}, "task: row 0: chat_template_kwargs is 'thinking', give names and"),
        ({"messages": [CALLING]}, "task: row 0: has tool_calls, and the base's chat template has no place for that"),
        ({"tools": ["[{"]}, "task: row 0: tools is text and not JSON, give a list"),
        ({"tools": [{"name": "f"}]}, "task: row 0: tools is {'name': 'f'}, give a list"),
    ],
    ids=str,
)
def test_what_a_template_has_no_place_for_is_refused_by_its_name(columns: dict[str, Any], message: str) -> None:
    assert message in refusal(CHAT, **columns)


def test_columns_that_are_no_variables_and_empty_ones_are_no_reason_to_refuse() -> None:
    assert said(CHAT, tools=[None], documents=[[]], style=["formal"]) == said(CHAT)

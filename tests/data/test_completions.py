import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from speaking import CHAT, make_tokenizer
from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from peertune.data.batches import UNLABELLED, Encoded
from peertune.data.completions import completions, encode_choices, encode_completions, encode_prompts, encode_words
from peertune.errors import DataError
from peertune.types import Split

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
]


def split_of(**columns: list[Any]) -> Split:
    return Split(columns, np.zeros(len(next(iter(columns.values()))), dtype=np.int64))


def read(encoded: Encoded, row: int) -> tuple[str, str]:
    """What a row says, and which part of it is to be predicted."""
    own = slice(int(encoded.starts[row]), int(encoded.starts[row] + encoded.lengths[row]))
    ids, labels = encoded.tokens["input_ids"][own], encoded.labels[own]
    wanted = labels != UNLABELLED
    assert (labels[wanted] == ids[wanted]).all()
    assert encoded.targets[row] == int(wanted.sum())
    tokenizer = make_tokenizer()
    return tokenizer.decode(ids), tokenizer.decode(ids[wanted])


def test_the_completion_and_the_end_are_learnt() -> None:
    split = split_of(prompt=["2+2=", ""], completion=[" 4", "five"])
    encoded = encode_completions(make_tokenizer(), split, ("prompt", "completion"), 64)
    assert read(encoded, 0) == ("2+2= 4</s>", " 4</s>")
    assert read(encoded, 1) == ("five</s>", "ive</s>")  # nothing comes before the first token of all
    assert list(encoded.long) == []


@pytest.mark.parametrize("own", [[0], [1, 3], [4, 5]])
def test_rows_encoded_alone_are_those_of_the_whole_split(own: list[int]) -> None:
    split = split_of(prompt=["a", "bc", "def", "gh", "i", ""], completion=["1", "23", "456", "78", "9", "0123456"])
    whole = encode_completions(make_tokenizer(), split, ("prompt", "completion"), 6)
    encoded = encode_completions(make_tokenizer(), split, ("prompt", "completion"), 6, np.array(own))
    assert encoded.token_labels
    assert [read(encoded, row) for row in own] == [read(whole, row) for row in own]
    assert np.flatnonzero(encoded.lengths).tolist() == np.flatnonzero(encoded.targets).tolist() == own
    assert list(encoded.long) == [row for row in whole.long if row in own]
    split = Split({"prompt": split.columns["prompt"]}, np.array([0, 1, 1, 0, 1, 0]))
    chosen = [encode_words(make_tokenizer(), split, ["no", "yes"], 6, rows) for rows in (None, np.array(own))]
    assert [read(chosen[1], row) for row in own] == [read(chosen[0], row) for row in own]


def test_errors_call_a_row_what_its_source_calls_it() -> None:
    split = split_of(prompt=["a", "b", ""], completion=["1", "2", ""])
    with pytest.raises(DataError, match=r"^task: row 2: '' has no tokens"):
        encode_completions(make_tokenizer(), split, ("prompt", "completion"), 6, np.array([1, 2]))
    split = replace(split, numbers=np.array([2, 5, 9]), unit="line")
    with pytest.raises(DataError, match=r"^task: line 9: '' has no tokens"):
        encode_completions(make_tokenizer(), split, ("prompt", "completion"), 6, np.array([1, 2]))
    with pytest.raises(DataError, match=r"^task: line 9: a prompt without tokens"):
        encode_prompts(make_tokenizer(), split.take(np.array([0, 2]), ["prompt"]), ("prompt", "prompt"), 6)


def test_of_plain_text_all_is_learnt() -> None:
    encoded = encode_completions(make_tokenizer(), split_of(text=["abc"]), ("text",), 64)
    assert read(encoded, 0) == ("abc</s>", "bc</s>")


def test_of_a_conversation_the_last_message_is_learnt() -> None:
    encoded = encode_completions(make_tokenizer(CHAT), split_of(messages=[TURNS]), ("messages",), 64)
    whole = "<s>[system] be brief\n[user] hello\n[assistant] yes</s>\n"
    assert read(encoded, 0) == (whole, "yes</s>\n")
    prompts, long = encode_prompts(make_tokenizer(CHAT), split_of(messages=[TURNS]), ("messages",), 64)
    assert make_tokenizer().decode(prompts[0]) == "<s>[system] be brief\n[user] hello\n[assistant] "
    assert long == []
    assert completions(make_tokenizer(), encoded, [0]) == (["yes\n"], {1})


def test_what_a_template_adds_to_an_answer_is_right_and_its_own_end_ends_it() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}<|end|>"
        "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|assistant|>"]})
    encoded = encode_completions(tokenizer, split_of(messages=[TURNS]), ("messages",), 64)
    said, ends = completions(tokenizer, encoded, [0])
    assert said[0].strip() == "<think></think>yes"
    assert tokenizer.convert_ids_to_tokens(list(ends)) == ["<|end|>"]


def test_a_template_that_writes_the_date_writes_the_same_on_every_day() -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }} {% endfor %}")
    encoded = encode_completions(tokenizer, split_of(messages=[TURNS]), ("messages",), 64)
    assert read(encoded, 0) == ("26 Jul 2024 be brief hello yes ", "yes ")


@pytest.mark.parametrize("words", [["是", "昰"], ["😀", "😁"]])
def test_characters_of_several_tokens_stay_whole(words: list[str]) -> None:
    split = Split({"prompt": ["x"]}, np.array([1]))
    choices = encode_choices(make_tokenizer(), split, words, 64)
    assert [read(choices, row)[0] for row in (0, 1)] == [f"x{word}" for word in words]
    pairs = split_of(prompt=["x"], completion=words[1:])
    assert read(encode_completions(make_tokenizer(), pairs, ("prompt", "completion"), 64), 0)[1] == f"{words[1]}</s>"


def test_what_a_tokenizer_ends_texts_with_ends_completions_and_no_prompts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    split = split_of(prompt=["ab"], completion=["c"])
    assert read(encode_completions(tokenizer, split, ("prompt", "completion"), 64), 0) == ("<s>abc</s>", "c</s>")
    assert (
        encode_prompts(tokenizer, split, ("prompt", "completion"), 64)[0][0].tolist() == tokenizer("ab").input_ids[:-1]
    )
    words = encode_choices(tokenizer, Split({"prompt": ["ab"]}, np.array([0])), ["c", "d"], 64)
    assert read(words, 0) == ("<s>abc", "c")


def test_what_a_tokenizer_puts_around_every_text_stands_once_in_those_that_have_it_already() -> None:
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = around
    for inputs, rows in (
        (("text",), {"text": ["one", "<s>one", "one</s>", "<s>one</s>"]}),
        (("prompt", "completion"), {"prompt": ["q", "<s>q"], "completion": ["one", "one</s>"]}),
        (("prompt", "completion"), {"prompt": ["", "<s>", ""], "completion": ["one", "one", "<s>one"]}),
    ):
        split = split_of(**rows)
        encoded = encode_completions(tokenizer, split, inputs, 64)
        (first, *others) = (read(encoded, row) for row in range(len(split)))
        assert first[0].count("<s>") == first[0].count("</s>") == 1
        assert others == [first] * len(others)
    prompts, _ = encode_prompts(tokenizer, split_of(prompt=["q", "<s>q"], completion=["a", "a"]), inputs, 64)
    assert [tokenizer.decode(prompt) for prompt in prompts] == ["<s>q"] * 2
    words = encode_words(tokenizer, Split({"prompt": ["q", "<s>q"]}, np.array([0, 0])), ["no", "yes"], 64)
    assert read(words, 0) == read(words, 1) == ("<s>qno", "no")
    choices = encode_choices(tokenizer, Split({"prompt": ["q", "<s>q"]}, np.array([0, 0])), ["no", "yes"], 64)
    assert [read(choices, row) for row in (0, 1)] == [read(choices, row) for row in (2, 3)]
    plain = encode_completions(make_tokenizer(), split_of(text=["<s>one"]), ("text",), 64)
    assert read(plain, 0)[0] == "<s>one</s>"  # where the tokenizer puts none, the text's own stays


def test_words_are_said_after_the_same_prompt() -> None:
    split = Split({"prompt": ["abcdefgh"]}, np.array([0]))
    choices = encode_choices(make_tokenizer(), split, [" no", " probably"], 12)
    assert [read(choices, row) for row in (0, 1)] == [("fgh no", " no"), ("fgh probably", " probably")]


def test_words_are_judged_from_the_first_token_in_which_any_of_them_differs() -> None:
    known = json.loads(make_tokenizer().backend_tokenizer.to_str())
    known["model"]["vocab"]["bc"] = 258
    known["model"]["merges"] = [["b", "c"]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(known)), pad_token="</s>")
    choices = encode_choices(tokenizer, Split({"prompt": ["ab"]}, np.array([0])), ["c", "d"], 64)
    said = choices.labels[choices.labels != UNLABELLED].tolist()
    assert tokenizer.convert_ids_to_tokens(said) == ["bc", "b", "d"], "the first word takes a letter of the prompt"


def test_long_prompts_to_go_on_from_are_told() -> None:
    split = split_of(prompt=["abc", "abcdef"], completion=["x", "y"])
    prompts, long = encode_prompts(make_tokenizer(), split, ("prompt", "completion"), 4)
    assert (make_tokenizer().decode(prompts[1]), long) == ("cdef", [1])


def test_a_word_of_a_class_is_learnt_without_an_end() -> None:
    split = Split({"prompt": ["is it?", "or?"]}, np.array([1, 0]))
    encoded = encode_words(make_tokenizer(), split, [" no", " yes"], 64)
    assert [read(encoded, row) for row in (0, 1)] == [("is it? yes", " yes"), ("or? no", " no")]
    choices = encode_choices(make_tokenizer(), split, [" no", " yes"], 64)
    assert [read(choices, row)[0] for row in range(4)] == ["is it? no", "is it? yes", "or? no", "or? yes"]


@pytest.mark.parametrize(
    ("length", "whole", "learnt"),
    [
        (13, "abcdefgh wxy</s>", " wxy</s>"),
        (12, "bcdefgh wxy</s>", " wxy</s>"),
        (7, "gh wxy</s>", " wxy</s>"),
        (6, "h wxy</s>", " wxy</s>"),
        (5, "h wxy", " wxy"),
        (3, "h w", " w"),
    ],
)
def test_a_long_row_loses_the_beginning_of_its_prompt_then_the_end(length: int, whole: str, learnt: str) -> None:
    split = split_of(prompt=["abcdefgh", "x"], completion=[" wxy", "y"])
    encoded = encode_completions(make_tokenizer(), split, ("prompt", "completion"), length)
    assert read(encoded, 0) == (whole, learnt)
    assert list(encoded.long) == [0] * (length < 13)


def test_the_token_that_begins_every_text_stays() -> None:
    encoded = encode_completions(make_tokenizer(CHAT), split_of(messages=[TURNS]), ("messages",), 12)
    assert read(encoded, 0) == ("<s>tant] yes</s>\n", "yes</s>\n")


@pytest.mark.parametrize(
    ("chat", "messages", "said"),
    [
        (None, TURNS, "messages need a tokenizer with a chat template, and the base's has none"),
        ("{{ raise_exception('roles must alternate') }}", TURNS, "row 0: the chat template refuses it (roles must"),
        ("{{ messages | length }} {{ messages[-1].content }}", TURNS, "row 0: the chat template writes a conversation"),
    ],
)
def test_what_is_wrong_with_a_chat_template_is_said(chat: str | None, messages: list[Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        encode_completions(make_tokenizer(chat), split_of(messages=[messages]), ("messages",), 64)
    assert said in str(error.value)


def test_a_template_writes_tool_calls_and_nothing_for_content_that_is_null() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked = {"role": "user", "content": "Is None null?"}
    split = split_of(messages=[[asked, {"role": "assistant", "content": None, "tool_calls": [call]}]])
    calls = "{% for c in m.tool_calls %}<{{ c.function.name }}>{% endfor %}{{ eos_token }}{% endfor %}"
    for content in ("m.content", "m.content | trim", "m.content or ''"):
        tokenizer = make_tokenizer("{% for m in messages %}{{ " + content + " }}" + calls)
        assert read(encode_completions(tokenizer, split, ("messages",), 64), 0)[1] == "<add></s>"


def test_a_completion_without_tokens_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    split = Split({"prompt": ["is it?"]}, np.array([1]))
    with pytest.raises(DataError, match="row 0: '  ' has no tokens; give a completion that has some"):
        encode_words(tokenizer, split, [" no", "  "], 64)


def test_a_prompt_without_tokens_can_not_be_gone_on_from() -> None:
    split = split_of(prompt=[""], completion=["five"])
    with pytest.raises(DataError, match="row 0: a prompt without tokens; to generate, give each row a prompt"):
        encode_prompts(make_tokenizer(), split, ("prompt", "completion"), 64)

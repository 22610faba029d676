"""What changes one of a method's four values: `schedule`, `local`, `message` or `mixer`.

A modifier's first parameter is the value that it changes, under that name, and it returns another of the same kind. The
rest of its signature is its schema: `modifiers: [{name: half}]` in a recipe. Several that change one kind apply in the
order in which they stand.
"""

from collections.abc import Callable
from typing import Any

from peertune.method import At, Memory, Message, Phase
from peertune.types import Tensors


def half(message: Message) -> Message:
    """Send adapters in bfloat16, which halves what travels of those in float32.

    Others read a rounded adapter, so differences of what is read are mixed, see `peertune.rounds.round`: with symmetric
    W the clients' mean stays what it was. What travels beside adapters stays as it is. Our own; rounding values without
    error feedback leaves clients about one part in 500 apart.
    """

    def send(adapters: Tensors, memory: Memory, at: At, phase: Phase) -> tuple[Tensors, Memory]:
        sent, changed = message.send(adapters, memory, at, phase)
        return {name: x.bfloat16() if name in adapters else x for name, x in sent.items()}, changed

    def read(like: Tensors, heard: Tensors) -> Tensors:
        whole = {name: x.to(like[name].dtype) if name in like else x for name, x in heard.items()}
        return whole if message.read is None else message.read(like, whole)

    return message._replace(send=send, read=read, exact=False)


MODIFIERS: dict[str, Callable[..., Any]] = {"half": half}
"""Name in a recipe → what changes a value of a method."""

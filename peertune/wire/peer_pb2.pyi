from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("hello", "wait", "total", "data", "verdict", "roster", "post")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    POST_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    wait: Wait
    total: int
    data: bytes
    verdict: Verdict
    roster: bytes
    post: Post
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., total: _Optional[int] = ..., data: _Optional[bytes] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., roster: _Optional[bytes] = ..., post: _Optional[_Union[Post, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "federation", "agreed", "round", "roster_serial", "purpose", "clock", "own_roster", "incarnation", "nonce", "chunk_bytes")
    class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SWAP: _ClassVar[Hello.Purpose]
        SETTLE: _ClassVar[Hello.Purpose]
        PING: _ClassVar[Hello.Purpose]
        CALL_BACK: _ClassVar[Hello.Purpose]
        ECHO: _ClassVar[Hello.Purpose]
        PUSH: _ClassVar[Hello.Purpose]
        DONE: _ClassVar[Hello.Purpose]
    SWAP: Hello.Purpose
    SETTLE: Hello.Purpose
    PING: Hello.Purpose
    CALL_BACK: Hello.Purpose
    ECHO: Hello.Purpose
    PUSH: Hello.Purpose
    DONE: Hello.Purpose
    class AgreedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    AGREED_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROSTER_SERIAL_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    OWN_ROSTER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    federation: str
    agreed: _containers.ScalarMap[str, str]
    round: int
    roster_serial: int
    purpose: Hello.Purpose
    clock: float
    own_roster: bool
    incarnation: int
    nonce: int
    chunk_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., federation: _Optional[str] = ..., agreed: _Optional[_Mapping[str, str]] = ..., round: _Optional[int] = ..., roster_serial: _Optional[int] = ..., purpose: _Optional[_Union[Hello.Purpose, str]] = ..., clock: _Optional[float] = ..., own_roster: _Optional[bool] = ..., incarnation: _Optional[int] = ..., nonce: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("round", "step", "left_ms")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    round: int
    step: int
    left_ms: int
    def __init__(self, round: _Optional[int] = ..., step: _Optional[int] = ..., left_ms: _Optional[int] = ...) -> None: ...

class Post(_message.Message):
    __slots__ = ("degree", "age_ms")
    DEGREE_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    degree: int
    age_ms: int
    def __init__(self, degree: _Optional[int] = ..., age_ms: _Optional[int] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("outcome", "reason", "round")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Verdict.Outcome]
        HAVE: _ClassVar[Verdict.Outcome]
        COUNTED: _ClassVar[Verdict.Outcome]
        PASSED: _ClassVar[Verdict.Outcome]
        REFUSED: _ClassVar[Verdict.Outcome]
    UNKNOWN: Verdict.Outcome
    HAVE: Verdict.Outcome
    COUNTED: Verdict.Outcome
    PASSED: Verdict.Outcome
    REFUSED: Verdict.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    outcome: Verdict.Outcome
    reason: str
    round: int
    def __init__(self, outcome: _Optional[_Union[Verdict.Outcome, str]] = ..., reason: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

"""Requests and answers of OpenAI's API, as far as one model on this machine can serve them.

Parameters that would change the answer and that this server does not have are refused, unless their value changes
nothing, such as ``n: 1`` or null. All other unknown parameters are ignored.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsellm.errors import shown
from sparsellm.serving.prompts import chat_ids
from sparsepack.arguments import MOST
from sparsepack.generation import (
    MOST_PENALTY,
    MOST_SEED,
    MOST_TEMPERATURE,
    Generation,
    Sampling,
    not_tiny,
    whole,
)

Tokens = Annotated[int, Field(ge=1, lt=1 << 31)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Words = Annotated[str, AfterValidator(whole)]
Temperature = Annotated[
    float, Field(ge=0, le=MOST_TEMPERATURE), AfterValidator(not_tiny)
]

# What would change the answer and is not supported, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "tools": ([],), "tool_choice": ("none", "auto"), "tool_calls": ([],),
    "functions": ([],), "function_call": ("none", "auto"),
    "grammar": ("",), "json_schema": ({},), "guided_json": ({},), "guided_regex": ("",),
    "structured_outputs": ({},),
}  # fmt: skip


def escaped(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON can hold and UTF-8 cannot, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _joined(content: Any) -> Any:
    """The text of a message whose parts are all text; anything else unchanged, and refused as no text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            return content
        texts.append(part["text"])
    return "".join(texts)


def _changes_nothing(name: str, value: object) -> bool:
    """In JSON, ``logprobs: 0`` asks for something, and ``false`` does not."""
    if value is None or name not in _UNSUPPORTED:
        return True
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _UNSUPPORTED[name]
    )


class _Given(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if not _changes_nothing(name, value):
                raise PydanticCustomError(
                    "unsupported",
                    "{name} is {value}, which this server does not support",
                    {"name": name, "value": shown(value)},
                )
        return {name: value for name, value in values.items() if value is not None}


class Message(_Given):
    """One message of a conversation; only text."""

    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(
            lambda role: "system" if role == "developer" else role
        ),  # OpenAI's newer name
    ]
    content: Annotated[Words, BeforeValidator(_joined)]
    name: Words | None = None


_SAMPLED = {field.name for field in fields(Sampling)}


class StreamOptions(_Given):
    """What a stream holds besides the text."""

    include_usage: bool = False


class Asked(_Given):
    """What chat and completions have in common.

    Attributes:
        KIND, CHUNK, PREFIX: the API's names of an answer and of a piece of one, and how its id begins.
        FIRST, LAST: what the first and the last piece of a stream say in place of text.
    """

    KIND: ClassVar[str]
    CHUNK: ClassVar[str]
    PREFIX: ClassVar[str]
    FIRST: ClassVar[dict[str, Any]]
    LAST: ClassVar[dict[str, Any]]

    model: str | None = None
    max_tokens: Annotated[
        Tokens | None,
        Field(validation_alias=AliasChoices("max_completion_tokens", "max_tokens")),
    ] = None
    temperature: Annotated[Temperature, Field(le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # those that user interfaces send besides OpenAI's; -1 is all tokens, as 0
    top_k: Annotated[int, Field(ge=-1, le=MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MOST_PENALTY)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Seed | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=500)]],
        Field(max_length=4),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = []
    ignore_eos: bool = False  # not OpenAI's; other servers have it too
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def sampling(self) -> Sampling:
        """How the prompt is continued; what is not asked is as the model recommends, with another seed each time."""
        if self.seed is None:
            seed = secrets.randbits(63)
        else:
            seed = self.seed
        given = self.model_dump(include=_SAMPLED)
        if self.top_k == -1:
            given["top_k"] = 0
        return Sampling(**{**given, "seed": seed})

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """The prompt as token ids ``(1, tokens)``."""
        raise NotImplementedError

    def whole(self, text: str) -> dict[str, Any]:
        """A whole answer with this text."""
        raise NotImplementedError

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of an answer with this text."""
        return self.whole(text)


class ChatRequest(Asked):
    """``POST /v1/chat/completions``."""

    KIND = "chat.completion"
    CHUNK = "chat.completion.chunk"
    PREFIX = "chatcmpl-"
    # the role only once, since clients join the values of all pieces
    FIRST: ClassVar = {"delta": {"role": "assistant", "content": ""}}
    LAST: ClassVar = {"delta": {}}

    messages: Annotated[list[Message], Field(min_length=1)]

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return chat_ids(
            tokenizer,
            [message.model_dump(exclude_none=True) for message in self.messages],
        )

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


class CompletionRequest(Asked):
    """``POST /v1/completions``."""

    KIND = "text_completion"
    CHUNK = "text_completion"
    PREFIX = "cmpl-"
    FIRST: ClassVar = {"text": ""}
    LAST: ClassVar = {"text": ""}

    prompt: Annotated[
        Words,
        BeforeValidator(
            lambda value: (
                value[0] if isinstance(value, list) and len(value) == 1 else value
            )
        ),
    ]

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        ids: Tensor = tokenizer(self.prompt, return_tensors="pt")["input_ids"]
        return ids

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}


class Answer:
    """The JSON objects that answer a request."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._head = {
            "id": asked.PREFIX + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, result: Generation) -> dict[str, Any]:
        """The answer in one object."""
        said = self._asked.whole(result.text)
        return {
            **self._head,
            "object": self._asked.KIND,
            "choices": [_choice(said, result.finish)],
            "usage": _usage(result),
        }

    def first(self) -> dict[str, Any]:
        """The beginning of a stream."""
        return self._piece([_choice(self._asked.FIRST, None)], None)

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of text in a stream."""
        return self._piece([_choice(self._asked.piece(text), None)], None)

    def last(self, result: Generation) -> list[dict[str, Any]]:
        """The end of a stream: what ended it, and the numbers of tokens if the client asks for them."""
        ended = self._piece([_choice(self._asked.LAST, result.finish)], None)
        if not self._asked.stream_options.include_usage:
            return [ended]
        return [ended, self._piece([], _usage(result))]

    def _piece(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None
    ) -> dict[str, Any]:
        piece = {**self._head, "object": self._asked.CHUNK, "choices": choices}
        if self._asked.stream_options.include_usage:
            piece["usage"] = usage
        return piece


def _choice(said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish}


def _usage(result: Generation) -> dict[str, int]:
    prompt = result.prompt_tokens
    new = result.new_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
    }


def error(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {
        "error": {
            "message": escaped(message),
            "type": kind,
            "param": param,
            "code": code,
        }
    }

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
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
        return content
    return content


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
    """What chat and completions have in common."""

    KIND: ClassVar[str]
    CHUNK: ClassVar[str]
    PREFIX: ClassVar[str]

    model: str | None = None
    max_tokens: Tokens | None = None
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

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer that the client asks for."""
        return self.max_tokens

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

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def piece(
        self, text: str | None, finish: str | None, *, first: bool
    ) -> dict[str, Any]:
        """A piece of the answer; no text at the end of a stream."""
        return self.choice(text or "", finish)


class ChatRequest(Asked):
    """``POST /v1/chat/completions``."""

    KIND = "chat.completion"
    CHUNK = "chat.completion.chunk"
    PREFIX = "chatcmpl-"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None

    @property
    def limit(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        return self.max_completion_tokens

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        return chat_ids(
            tokenizer,
            [message.model_dump(exclude_none=True) for message in self.messages],
        )

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish,
        }

    def piece(
        self, text: str | None, finish: str | None, *, first: bool
    ) -> dict[str, Any]:
        delta = {}
        if first:  # only once, since clients join the values of all pieces
            delta["role"] = "assistant"
        if text is not None:
            delta["content"] = text
        return {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish,
        }


class CompletionRequest(Asked):
    """``POST /v1/completions``."""

    KIND = "text_completion"
    CHUNK = "text_completion"
    PREFIX = "cmpl-"

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

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


class Answer:
    """The JSON objects that answer a request."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._first = True
        self.with_usage = asked.stream_options.include_usage
        self._head = {
            "id": asked.PREFIX + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, result: Generation) -> dict[str, Any]:
        """The answer in one object."""
        choice = self._asked.choice(result.text, result.finish)
        return {
            **self._head,
            "object": self._asked.KIND,
            "choices": [choice],
            "usage": _usage(result),
        }

    def piece(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        if self.with_usage:
            usage = {"usage": None}
        else:
            usage = {}
        choice = self._asked.piece(text, finish, first=self._first)
        self._first = False
        return {**self._head, "object": self._asked.CHUNK, "choices": [choice], **usage}

    def usage(self, result: Generation) -> dict[str, Any]:
        """The last object of a stream, if the client asks for it."""
        return {
            **self._head,
            "object": self._asked.CHUNK,
            "choices": [],
            "usage": _usage(result),
        }


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

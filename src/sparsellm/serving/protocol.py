"""Requests and answers of OpenAI's API, as far as one model on this machine can serve them.

Parameters that would change the answer and that this server does not have are refused, unless their value changes
nothing, such as ``n: 1`` or null. All other unknown parameters are ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsellm.errors import DataError, ModelError, shown
from sparsellm.serving.prompts import Message, chat_ids
from sparsellm.serving.worker import Job
from sparsepack.arguments import MOST, check, check_choice, refuse
from sparsepack.errors import SettingError
from sparsepack.generation import Generation, Sampling, check_text

# What would change the answer and is not supported, with the values besides null that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_logprobs": (0,),
    "audio": (),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "tool_calls": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "grammar": ("",),
    "json_schema": ({},),
    "guided_json": ({},),
    "guided_regex": ("",),
    "structured_outputs": ({},),
}
_SAMPLED = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "ignore_eos",
}


class FieldError(SettingError):
    """A field of a request has a value that is refused.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, message: object) -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def blamed_on(field: str) -> Iterator[None]:
    """A mistake of the client that is noticed here becomes a FieldError of this field."""
    try:
        yield
    except (SettingError, DataError, ModelError) as error:
        raise FieldError(field, error) from None


class Asked(Job):
    """A job that a client asks for, and the JSON objects that answer it. A SettingError says what it has that is
    refused; it is a FieldError if that is a field.

    Attributes:
        model: the name of the model that is asked for.
        prompt_field: the field that has the prompt.
        limit_field: the field that has the most tokens of the answer.
        counts: whether the numbers of tokens come after the last piece.
    """

    def __init__(self, body: bytearray, served: str, *, chat: bool) -> None:
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise SettingError(f"the body is not JSON: {error}") from None
        given = _supported("the body", values)
        self._chat = chat
        self.prompt_field = "messages" if chat else "prompt"
        with blamed_on(self.prompt_field):
            self._prompt = _prompt(given.get(self.prompt_field), chat=chat)
        limit = None
        self.limit_field = "max_tokens"
        for name in ("max_tokens", "max_completion_tokens"):  # the newer name counts
            if name in given:
                limit = given[name]
                self.limit_field = name
                with blamed_on(name):
                    check(name, limit, int, least=1, most=MOST)
        streams = given.get("stream", False)
        with blamed_on("stream"):
            check("stream", streams, bool)
        with blamed_on("stream_options"):
            options = _supported("stream_options", given.get("stream_options", {}))
            self.counts = options.get("include_usage", False)
            check("include_usage", self.counts, bool)
        self.model = given.get("model", served)
        with blamed_on("model"):
            check("model", self.model, str)
        number = secrets.token_hex(12)
        self._head = {
            "id": f"chatcmpl-{number}" if chat else f"cmpl-{number}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": served,
        }
        super().__init__(self._prompt_ids, _sampling(given), limit, streams=streams)

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        if self._chat:
            return chat_ids(tokenizer, self._prompt)
        ids: Tensor = tokenizer(self._prompt, return_tensors="pt")["input_ids"]
        return ids

    def piece(self, said: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """A piece of a stream, by what it adds to the message, and what ended it."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self._chat:
            choice["delta"] = said
        else:
            choice["text"] = said.get("content", "")
        piece: dict[str, Any] = {**self._head, "choices": [choice]}
        if self.counts:
            piece["usage"] = None
        return piece

    def totals(self, result: Generation) -> dict[str, Any]:
        """The numbers of tokens, as the last piece of a stream."""
        return {**self.piece({}), "choices": [], "usage": _usage(result)}

    def whole(self, result: Generation) -> dict[str, Any]:
        """All of it in one object."""
        said = {"role": "assistant", "content": result.text}
        answer = {**self.piece(said, result.finish), "usage": _usage(result)}
        if self._chat:
            answer["object"] = "chat.completion"
            (choice,) = answer["choices"]
            choice["message"] = choice.pop("delta")
        return answer


def _supported(name: str, values: Any) -> dict[str, Any]:
    """The values of a JSON object by name, without null."""
    check(name, values, dict)
    given = {key: value for key, value in values.items() if value is not None}
    for key in given.keys() & _UNSUPPORTED:
        if not _changes_nothing(key, given[key]):
            raise FieldError(
                key, f"{key} is {shown(given[key])}, which this server does not support"
            )
    return given


def _changes_nothing(name: str, value: object) -> bool:
    """In JSON, ``logprobs: 0`` asks for something, and ``false`` does not."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _UNSUPPORTED[name]
    )


def _sampling(given: dict[str, Any]) -> Sampling:
    asked = {name: value for name, value in given.items() if name in _SAMPLED}
    if asked.get("top_k") == -1:  # user interfaces ask for all tokens so
        asked["top_k"] = 0
    if isinstance(asked.get("stop"), str):
        asked["stop"] = [asked["stop"]]
    for name, value in asked.items():
        with blamed_on(name):
            # OpenAI's limits are narrower
            if name in ("temperature", "frequency_penalty", "presence_penalty"):
                check(name, value, float, least=-2, most=2)
            Sampling(**{name: value})
    seed = secrets.randbits(63)
    return Sampling(**{"temperature": None, "seed": seed, **asked})


def _prompt(given: Any, *, chat: bool) -> Any:
    """The messages of a conversation, or a text, which may stand alone in a list."""
    if chat:
        return _messages(given)
    if isinstance(given, list) and len(given) == 1:
        (given,) = given
    check_text("prompt", given)
    return given


def _messages(messages: Any) -> list[Message]:
    check("messages", messages, list)
    check("the number of messages", len(messages), int, least=1)
    checked: list[Message] = []
    for index, message in enumerate(messages):
        name = f"messages.{index}"
        given = _supported(name, message)
        role: Any = given.get("role")
        if role == "developer":  # OpenAI's newer name
            role = "system"
        check_choice(f"{name}.role", role, ("system", "user", "assistant"))
        content: Any = given.get("content")
        if isinstance(content, list):
            content = _joined(f"{name}.content", content)
        check_text(f"{name}.content", content)
        checked.append({"role": role, "content": content})
        if "name" in given:
            check_text(f"{name}.name", given["name"])
            checked[-1]["name"] = given["name"]
    return checked


def _joined(name: str, parts: list[Any]) -> str:
    """The text of a message whose parts are all text."""
    texts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            refuse(name, parts, "text")
        texts.append(part["text"])
    return "".join(texts)


def error_body(
    message: str, kind: str, *, field: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def _usage(result: Generation) -> dict[str, int]:
    prompt = result.prompt_tokens
    new = result.new_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
    }

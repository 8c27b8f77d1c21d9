# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for a vLLM OpenAI server that is behind its path guard. It proves nothing about vLLM.

Tests put an Answer into `overrides`, by (method, path), to make it misbehave; `check_key = False` lets everybody in.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Any
from urllib.parse import urlsplit

from .server import Answer, Handler, Server

PROMPT_TOKENS = 100


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def as_events(*events: Any, done: bool = True) -> Answer:
    """Server-sent events, as a stream of chat completion chunks ends them."""
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + (["data: [DONE]\n\n"] if done else [])
    return Answer(200, "".join(lines).encode(), {"Content-Type": "text/event-stream; charset=utf-8"})


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


class OpenAiServer(Server):
    def __init__(self, key: str = "sk-the-right-key", model: str = "random-llama") -> None:
        super().__init__()
        self.key, self.model, self.check_key = key, model, True
        self.task = "generate"
        self.arguments = '{"city": "Oslo"}'  # of the tool call that it makes
        self.thoughts = 0  # tokens that it thinks before it answers; more than max_tokens cut it off
        self.thoughts_as = "reasoning"  # the field's name, by release
        self.fails_in_thought = (
            False  # at a forced call that is cut off there, as releases do (vllm-project/vllm#40147)
        )
        self.answers_up_to = 1 << 20  # tokens; more take longer than anybody waits
        self.max_model_len = 8192
        self.refusal: Answer | None = None  # of a proxy before it, whatever is asked
        self.overrides: dict[tuple[str, str], Answer] = {}

    def respond(self, request: Handler) -> Answer:
        path = urlsplit(request.path).path
        if self.refusal:
            return self.refusal
        if path.startswith("/v1/") and self.check_key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return as_json({"error": "Unauthorized"}, 401)
        override = self.overrides.get((request.command, path))
        if override:
            return override
        if (request.command, path) == ("GET", "/health"):
            return Answer(200)
        if (request.command, path) == ("GET", "/v1/models"):
            return as_json(
                {"object": "list", "data": [{"id": self.model, "object": "model", "max_model_len": self.max_model_len}]}
            )
        completions = (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"))
        if (request.command, path) in completions and self.task == "generate":
            return self._complete(json.loads(request.content), path.endswith("chat/completions"))
        if (request.command, path) == ("POST", "/v1/embeddings") and self.task == "embed":
            return self._embed(json.loads(request.content))
        if (request.command, path) == ("POST", "/v1/rerank") and self.task == "score":
            documents = json.loads(request.content)["documents"]
            results = [{"index": index, "relevance_score": 0.9 - index / 10} for index, _ in enumerate(documents)]
            return as_json({"results": results})
        return as_json({"error": {"message": "Not found", "code": 404}}, 404)

    def _complete(self, body: dict[str, Any], chat: bool) -> Answer:
        if body["model"] != self.model:
            return as_json({"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}, 404)
        if self.thoughts and chat and not body.get("stream"):
            return self._think(body)
        if chat and body.get("stream"):
            words = [chunk(content=" amber"), chunk(content=" zephyr")]
            return as_events(chunk(role="assistant", content=""), *words, chunk("length"))
        if "tool_choice" in body:
            return self._call(body)
        choice = {"message": {"role": "assistant", "content": " amber zephyr"}} if chat else {"text": " amber anchor"}
        return as_json({"choices": [{"index": 0, "finish_reason": "length", **choice}]})

    def _call(self, body: dict[str, Any], **message: Any) -> Answer:
        function = {"name": body["tool_choice"]["function"]["name"], "arguments": self.arguments}
        calls = [{"id": "call-1", "type": "function", "function": function}]
        message = {"role": "assistant", "content": None, "tool_calls": calls, **message}
        return as_json({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

    def _think(self, body: dict[str, Any]) -> Answer:
        """As vLLM with a reasoning parser: thoughts come first, and no more tokens than there is room for."""
        if PROMPT_TOKENS + body["max_tokens"] > self.max_model_len:
            return as_json({"error": {"message": f"'max_tokens' is too large: {body['max_tokens']}", "code": 400}}, 400)
        if body["max_tokens"] > self.answers_up_to:
            return Answer(200, b"{}", stall_at=1)
        forced = isinstance(body.get("tool_choice"), dict)
        thoughts = {self.thoughts_as: "hmm " * min(self.thoughts, body["max_tokens"])}
        if self.thoughts < body["max_tokens"]:
            if forced:
                return self._call(body, **thoughts)
            message, reason = {"content": "amber", **thoughts}, "stop"
        elif forced and self.fails_in_thought:
            return Answer(500, b"Internal Server Error")
        else:
            message, reason = {"content": None, **thoughts}, "length"
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 1, "total_tokens": PROMPT_TOKENS + 1}
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}
        return as_json({"choices": [choice], "usage": usage})

    def _embed(self, body: dict[str, Any]) -> Answer:
        """A vector of a text's own checksum; equal texts have equal ones."""
        data = []
        for index, text in enumerate(body["input"]):
            sum_of = zlib.crc32(text.encode())
            vector = [float(sum_of >> shift & 15) - 7.5 for shift in range(0, 32, 4)]
            encoded = base64.b64encode(struct.pack("<8f", *vector)).decode()
            data.append({"index": index, "object": "embedding", "embedding": vector})
            if body.get("encoding_format") == "base64":  # what the SDK asks for
                data[-1]["embedding"] = encoded
        return as_json(
            {"object": "list", "model": self.model, "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        )

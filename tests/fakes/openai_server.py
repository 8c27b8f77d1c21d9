# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for a vLLM OpenAI server that is behind its path guard. It proves nothing about vLLM.

Tests put an Answer into `overrides`, by (method, path), to make it misbehave; `check_key = False` lets everybody in.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from .server import Answer, Handler, Server


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
        self.overrides: dict[tuple[str, str], Answer] = {}

    def respond(self, request: Handler) -> Answer:
        path = urlsplit(request.path).path
        if path.startswith("/v1/") and self.check_key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return as_json({"error": "Unauthorized"}, 401)
        override = self.overrides.get((request.command, path))
        if override:
            return override
        if (request.command, path) == ("GET", "/health"):
            return Answer(200)
        if (request.command, path) == ("GET", "/v1/models"):
            return as_json({"object": "list", "data": [{"id": self.model, "object": "model"}]})
        if (request.command, path) in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions")):
            return self._complete(json.loads(request.content), path.endswith("chat/completions"))
        return as_json({"error": {"message": "Not found", "code": 404}}, 404)

    def _complete(self, body: dict[str, Any], chat: bool) -> Answer:
        if body["model"] != self.model:
            return as_json({"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}, 404)
        if chat and body.get("stream"):
            words = [chunk(content=" amber"), chunk(content=" zephyr")]
            return as_events(chunk(role="assistant", content=""), *words, chunk("length"))
        choice = {"message": {"role": "assistant", "content": " amber zephyr"}} if chat else {"text": " amber anchor"}
        return as_json({"choices": [{"index": 0, "finish_reason": "length", **choice}]})

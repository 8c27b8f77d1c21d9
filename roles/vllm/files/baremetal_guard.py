# SPDX-License-Identifier: GPL-3.0-or-later
"""ASGI middleware for vLLM: closes every path that is not meant to be reached, and every way round the key.

vLLM's API key guards /v1 and a few more prefixes; metrics, tokenizer and control routes answer everybody. Loaded by
``--middleware baremetal_guard.PathGuard``. BAREMETAL_OPEN_PATHS lists, with spaces between them, the paths outside /v1
that stay open.
"""

import json
import os
import re

API = "/v1/"
# With any other character, as in "x?", Starlette before 1.0.1 takes the path for a part of the host, and vLLM before 0.22 asks
# for no key then (CVE-2026-48746).
HOST = re.compile(rb"[A-Za-z0-9._:%\[\]-]*\Z")
KINDS = {400: ("Malformed Host header", "BadRequestError"), 404: ("Not found", "NotFoundError")}


class PathGuard:
    def __init__(self, app):
        self.app = app
        self.open_paths = set(os.environ["BAREMETAL_OPEN_PATHS"].split())

    def refusal(self, scope):
        """Status of an answer that needs no application, 0 for what goes on to it."""
        if scope["type"] == "lifespan":
            return 0
        if not all(HOST.match(value) for name, value in scope.get("headers", ()) if name == b"host"):
            return 400
        path = scope.get("path", "")
        return 0 if path.startswith(API) or path in self.open_paths else 404

    async def __call__(self, scope, receive, send):
        status = self.refusal(scope)
        if not status:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            message, kind = KINDS[status]
            body = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

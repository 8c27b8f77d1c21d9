# SPDX-License-Identifier: GPL-3.0-or-later
"""ASGI middleware for vLLM: closes every path that is not meant to be reached.

vLLM's API key guards /v1 and a few more prefixes; metrics, tokenizer and control routes answer everybody. Loaded by
``--middleware baremetal_guard.PathGuard``. BAREMETAL_OPEN_PATHS lists, with spaces between them, the paths outside /v1
that stay open.
"""

import json
import os

API = "/v1/"
REFUSAL = json.dumps({"error": {"message": "Not found", "type": "NotFoundError", "code": 404}}).encode()


class PathGuard:
    def __init__(self, app):
        self.app = app
        self.open_paths = set(os.environ["BAREMETAL_OPEN_PATHS"].split())

    async def __call__(self, scope, receive, send):
        path = scope.get("path", "")
        if scope["type"] == "lifespan" or path.startswith(API) or path in self.open_paths:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for one vLLM server without its guard: the key guards /v1 alone, /metrics answers everybody.

    upstream.py PORT NAME     the key is in /etc/upstream.key

Every answer says which server gave it. A stream sends eight words, 0.25 s apart. /v1/hold answers after so many seconds, and
/run/held-NAME says that it has come.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, NAME = int(sys.argv[1]), sys.argv[2]
KEY = Path("/etc/upstream.key").read_text().strip()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Upstream", NAME)
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/v1/") and self.headers.get("Authorization") != "Bearer " + KEY:
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": "stand-in", "object": "model"}]})
        elif self.path == "/v1/chat/completions" and json.loads(body).get("stream"):
            self.stream()
        elif self.path == "/v1/completions":
            self.answer(200, {"choices": [{"index": 0, "text": " amber", "finish_reason": "stop"}]})
        elif self.path == "/v1/chat/completions":
            if "tool_choice" in json.loads(body):
                self.answer(400, {"error": {"message": "tool_choice requires --tool-call-parser to be set"}})
                return
            message = {"role": "assistant", "content": "amber from " + NAME, "size": len(body)}
            self.answer(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        elif self.path == "/v1/hold":
            Path("/run/held-" + NAME).touch()
            time.sleep(json.loads(body)["seconds"])
            self.answer(200, {"held_by": NAME})
        elif self.path in ("/health", "/metrics"):
            self.answer(200, {})
        else:
            self.answer(404, {"error": {"message": "not known to " + NAME, "code": 404}})

    def stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("X-Upstream", NAME)
        self.end_headers()
        words = [{"role": "assistant", "content": ""}] + [{"content": " amber"}] * 7
        for number, delta in enumerate(words):
            last = number == len(words) - 1
            choice = {"index": 0, "delta": delta, "finish_reason": "stop" if last else None}
            self.chunk(f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n")
            time.sleep(0.25)
        self.chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, text):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text.encode()))
        self.wfile.flush()

    do_GET = do_POST = handle_request

    def log_message(self, format, *args):
        pass


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()

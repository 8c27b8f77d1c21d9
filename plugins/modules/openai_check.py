#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: openai_check
short_description: Prove that an OpenAI endpoint answers, and that it answers nobody else
version_added: 0.1.0
description:
  - Sends real requests to a vLLM OpenAI endpoint and judges the answers. All checks run; the module fails at the end if
    one did not hold, and names each of them.
options:
  base_url:
    description: The endpoint, up to and with C(/v1).
    type: str
    required: true
  api_key:
    description: The key that the endpoint expects. Give this or O(api_key_file).
    type: str
  api_key_file:
    description: A file on this host that holds the key.
    type: path
  model:
    description: Name under which the model is served.
    type: str
    required: true
  task:
    description: What the service does; decides what is asked where O(checks) is not given.
    type: str
    choices: [generate, embed, score]
    default: generate
  checks:
    description:
      - What to prove, in this order. Left out, it is C(health), C(models), what the O(task) offers, C(wrong_key) and C(closed).
    type: list
    elements: str
    choices: [health, models, completion, chat, stream, embeddings, rerank, wrong_key, closed]
  ca_file:
    description: A file on this host with the certificate that the endpoint's own is checked with. Left out, the system's are taken.
    type: path
  closed_paths:
    description:
      - Paths that must not answer without the key. An answer below 400 is a failure.
      - O(open_paths) are left out.
    type: list
    elements: str
    default: []
  open_paths:
    description: Paths outside C(/v1) that are meant to answer everybody.
    type: list
    elements: str
    default: [/health]
  refusal:
    description:
      - The message with which a proxy before the endpoint refuses this host's address (HTTP 403). Then nothing is asked, and the
        task is skipped and says so. Any other 403 is judged as an answer of the endpoint.
    type: str
    default: ""
  prompt:
    description: What to ask.
    type: str
    default: Say hello.
  max_tokens:
    description: Longest answer in tokens.
    type: int
    default: 16
  timeout:
    description: Seconds for one request.
    type: int
    default: 120
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Can run in check mode.
    details: Sends nothing in check mode, as the endpoint need not be there yet.
    support: partial
"""

EXAMPLES = r"""
- name: Prove the endpoint
  baremetal.vllm.openai_check:
    base_url: http://127.0.0.1:8000/v1
    api_key_file: /etc/vllm/chat/api_key
    model: qwen2.5-7b
    closed_paths: [/metrics, /tokenize]
"""

RETURN = r"""
answer:
  description: What the model said to O(prompt), where the checks V(chat) or V(completion) ran.
  returned: success
  type: str
checks:
  description: Each check with C(name), C(ok), C(detail) and C(ms).
  returned: always
  type: list
  elements: dict
told:
  description: The checks in one line, or why there are none.
  returned: success
  type: str
  sample: health, models, chat (not offered)
"""

import json
import re
import ssl
import time
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from ansible.module_utils.basic import AnsibleModule

WRONG_KEY = "sk-this-key-is-wrong"
OFFERED = {"generate": ["completion", "chat", "stream"], "embed": ["embeddings"], "score": ["rerank"]}
DOCUMENTS = ["The cat sleeps on the sofa.", "Quarterly revenue rose by nine percent."]


class Failed(Exception):
    """A check that did not hold; the text says what was seen."""


class NotOffered(Exception):
    """The server says that it does not do this."""


class Endpoint:
    def __init__(self, params, key):
        self.base = params["base_url"].rstrip("/")
        self.root = self.base[: -len("/v1")]
        self.params, self.key = params, key
        # An endpoint that this host serves is never behind the host's proxy.
        handlers = [ProxyHandler({})]
        if self.base.startswith("https:"):
            handlers.append(HTTPSHandler(context=ssl.create_default_context(cafile=params["ca_file"])))
        self.opener = build_opener(*handlers)

    def send(self, url, body=None, key=None, **headers):
        """(status, text) of one request. Raises Failed when there is no HTTP answer at all."""
        headers["Content-Type"] = "application/json"
        if key:
            headers["Authorization"] = "Bearer " + key
        data = None if body is None else json.dumps(body).encode("utf-8")
        try:
            try:
                response = self.opener.open(Request(url, data, headers), timeout=self.params["timeout"])
            except HTTPError as error:
                response = error
            return response.getcode(), response.read().decode("utf-8", "replace")
        except (URLError, HTTPException, OSError) as error:
            raise Failed("%s: %s" % (url, getattr(error, "reason", error)))

    def ask(self, path, body=None):
        """Decoded JSON of an answer to the right key."""
        status, text = self.send(self.base + path, body, self.key)
        if status == 400 and "chat template" in text:
            raise NotOffered("the model has no chat template")
        if status != 200:
            raise Failed("%s: HTTP %d %s" % (path, status, text[:200]))
        try:
            return json.loads(text)
        except ValueError:
            raise Failed("%s: the answer is no JSON: %s" % (path, text[:200]))

    def refuses(self):
        """Whether a proxy before the endpoint lets this address not in."""
        if not self.params["refusal"]:
            return False
        try:
            status, text = self.send(self.base + "/models")
            return status == 403 and json.loads(text)["error"]["message"] == self.params["refusal"]
        except (Failed, KeyError, TypeError, ValueError):
            return False  # which the checks tell of

    def request(self, **extra):
        return dict(model=self.params["model"], max_tokens=self.params["max_tokens"], temperature=0, **extra)

    def messages(self):
        return [{"role": "user", "content": self.params["prompt"]}]

    # Each check returns one line that says what was seen.

    def health(self):
        status, text = self.send(self.root + "/health")
        if status != 200:
            raise Failed("/health: HTTP %d %s" % (status, text[:200]))
        return "HTTP 200"

    def models(self):
        names = [model["id"] for model in self.ask("/models")["data"]]
        if self.params["model"] not in names:
            raise Failed("/models lists %s, not %s" % (", ".join(names) or "nothing", self.params["model"]))
        return ", ".join(names)

    def told(self, answer):
        if not answer.strip():
            raise Failed("the answer is empty")
        return answer.strip()

    def said(self, message):
        # A reasoning model may spend all its tokens on thinking, under a name that changed; tokens were made all the same.
        return message.get("content") or message.get("reasoning") or message.get("reasoning_content") or ""

    def completion(self):
        return self.told(self.ask("/completions", self.request(prompt=self.params["prompt"]))["choices"][0]["text"])

    def embeddings(self):
        data = self.ask("/embeddings", {"model": self.params["model"], "input": DOCUMENTS})["data"]
        lengths = [len(entry["embedding"]) for entry in data]
        if len(lengths) != len(DOCUMENTS) or len(set(lengths)) != 1 or not any(data[0]["embedding"]):
            raise Failed("/embeddings: %d texts gave vectors of the lengths %s" % (len(DOCUMENTS), lengths))
        return "%d dimensions" % lengths[0]

    def rerank(self):
        body = {"model": self.params["model"], "query": "Where does the cat sleep?", "documents": DOCUMENTS}
        results = self.ask("/rerank", body)["results"]
        scores = [float(entry["relevance_score"]) for entry in results]
        if sorted(entry["index"] for entry in results) != [0, 1] or scores != sorted(scores, reverse=True):
            raise Failed("/rerank: two documents gave %s" % results)
        return "scores " + ", ".join("%.3f" % score for score in scores)

    def chat(self):
        choice = self.ask("/chat/completions", self.request(messages=self.messages()))["choices"][0]
        return self.told(self.said(choice["message"]))

    def stream(self):
        status, text = self.send(
            self.base + "/chat/completions", self.request(messages=self.messages(), stream=True), self.key
        )
        events = [line[len("data:") :].strip() for line in text.splitlines() if line.startswith("data:")]
        if status == 400 and "chat template" in text:
            raise NotOffered("the model has no chat template")
        if status != 200 or events[-1:] != ["[DONE]"]:
            raise Failed("the stream gave HTTP %d and did not end with [DONE]: %s" % (status, text[-200:]))
        answer = ""
        for event in map(json.loads, events[:-1]):
            if "error" in event:
                raise Failed("the stream broke off: %s" % event["error"])
            answer += "".join(self.said(choice["delta"]) for choice in event["choices"])
        self.told(answer)
        return "%d events" % len(events)

    def wrong_key(self):
        for key in (WRONG_KEY, None):
            status = self.send(self.base + "/models", key=key)[0]
            if status != 401:
                raise Failed("/v1/models with %s key: HTTP %d, not 401" % ("a wrong" if key else "no", status))
        # CVE-2026-48746: the path as vLLM before 0.22 reads it when it looks for a key.
        status = self.send(self.base + "/models", Host="x?")[0]
        if status < 400:
            raise Failed("/v1/models with no key and the Host header 'x?': HTTP %d, not a refusal" % status)
        return "HTTP 401 with a wrong key and without one"

    def closed(self):
        paths = [path for path in self.params["closed_paths"] if path not in self.params["open_paths"]]
        answered = []
        for path in paths:
            for body in (None, {}):
                status = self.send(self.root + path, body)[0]
                # 405 and 422 come from a route that is there and only dislikes the request.
                if status not in (401, 403, 404):
                    answered.append("%s %s: HTTP %d" % ("GET" if body is None else "POST", path, status))
        if answered:
            raise Failed("open without the key: " + ", ".join(answered))
        return "%d paths are closed" % len(paths)


def run(endpoint, name):
    start = time.time()
    try:
        ok, detail = True, getattr(endpoint, name)()
    except NotOffered as error:
        ok, detail = True, "not offered: %s" % error
    except Failed as error:
        ok, detail = False, str(error)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        ok, detail = False, "the answer has not the form of the OpenAI API: %r" % error
    return {"name": name, "ok": ok, "detail": detail, "ms": int((time.time() - start) * 1000)}


def main():
    names = ["health", "models", "completion", "chat", "stream", "embeddings", "rerank", "wrong_key", "closed"]
    module = AnsibleModule(
        argument_spec={
            "base_url": {"type": "str", "required": True},
            "api_key": {"type": "str", "no_log": True},
            "api_key_file": {"type": "path", "no_log": False},
            "model": {"type": "str", "required": True},
            "checks": {"type": "list", "elements": "str", "choices": names},
            "task": {"type": "str", "choices": sorted(OFFERED), "default": "generate"},
            "ca_file": {"type": "path"},
            "closed_paths": {"type": "list", "elements": "str", "default": []},
            "open_paths": {"type": "list", "elements": "str", "default": ["/health"]},
            "refusal": {"type": "str", "default": ""},
            "prompt": {"type": "str", "default": "Say hello."},
            "max_tokens": {"type": "int", "default": 16, "no_log": False},
            "timeout": {"type": "int", "default": 120},
        },
        mutually_exclusive=[("api_key", "api_key_file")],
        required_one_of=[("api_key", "api_key_file")],
        supports_check_mode=True,
    )
    params = module.params
    if not re.match(r"https?://[^/\s]+(/\S*)?/v1/?\Z", params["base_url"]):
        module.fail_json(
            msg="base_url is %r: give the address up to and with /v1, such as http://127.0.0.1:8000/v1"
            % params["base_url"]
        )
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, checks=[], answer="", told="not asked in check mode")
    key = params["api_key"]
    if params["api_key_file"]:
        try:
            with open(params["api_key_file"], "rb") as handle:
                key = handle.read().decode("utf-8", "replace").strip()
        except (IOError, OSError) as error:
            module.fail_json(msg="cannot read the API key from %s: %s" % (params["api_key_file"], error.strerror))
    # What does not fit into a header would be told in an error, and an empty value blots out every output.
    if not re.match(r"[!-~]+\Z", key):
        where = params["api_key_file"] or "api_key"
        module.fail_json(msg="the API key in %s is no key: give printable ASCII characters without spaces" % where)
    module.no_log_values.add(key)
    try:
        endpoint = Endpoint(params, key)
    except (IOError, OSError) as error:
        module.fail_json(msg="cannot read a certificate from %s: %s" % (params["ca_file"], error))
    if endpoint.refuses():
        message = "%s was not asked: it does not let the address of this host in" % params["base_url"]
        module.exit_json(changed=False, skipped=True, msg=message, told=message, checks=[], answer="")
    wanted = params["checks"] or ["health", "models"] + OFFERED[params["task"]] + ["wrong_key", "closed"]
    checks = [run(endpoint, name) for name in wanted]
    failed = [check for check in checks if not check["ok"]]
    if failed:
        lines = ["%s (%s)" % (check["name"], check["detail"]) for check in failed]
        module.fail_json(msg="%s does not hold: %s" % (params["base_url"], "; ".join(lines)), checks=checks)
    offered = [check for check in checks if not check["detail"].startswith("not offered: ")]
    answers = dict((check["name"], check["detail"]) for check in offered)
    told = ", ".join(check["name"] + ("" if check in offered else " (not offered)") for check in checks)
    module.exit_json(changed=False, checks=checks, told=told, answer=answers.get("chat", answers.get("completion", "")))


if __name__ == "__main__":
    main()

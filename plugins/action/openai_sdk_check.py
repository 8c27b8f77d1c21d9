# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Asks an OpenAI endpoint from the controller with the openai SDK. Documented in plugins/modules/openai_sdk_check.py."""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import math
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

try:
    import openai
except ImportError:  # said in run()
    openai = None

PROMPT = "Say hello."
CITY = "Oslo"
# One possible call, so that any model that the server holds to the schema makes it.
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": [CITY]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TEXTS = ["The cat sleeps on the sofa.", "The cat sleeps on the sofa.", "Quarterly revenue rose by nine percent."]
# Tokens for a tool call, and for one of a model that thinks first.
CALL_TOKENS, THINKING_TOKENS = 256, 4096
WRONG_KEY = "sk-this-key-is-wrong"
CHECKS = {
    "generate": ("models", "completion", "chat", "stream", "tool_call", "wrong_key"),
    "embed": ("models", "embeddings", "wrong_key"),
    "score": ("models", "rerank", "wrong_key"),
}


class Failed(Exception):
    """A check that did not hold; the text says what was seen."""


class NotOffered(Exception):
    """The server says that it does not do this."""

    kind = "not offered"


class NotJudged(Exception):
    """What was seen is no proof, neither for nor against it."""

    kind = "not judged"


class Unreachable(Exception):
    """There is no way from the controller to the endpoint."""


def cosine(a: list[float], b: list[float]) -> float:
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0


class Proof:
    """The checks. Each returns one line that says what was seen, or raises."""

    def __init__(self, client: Any, model: str, tool_calls: bool) -> None:
        self.client, self.model, self.tool_calls = client, model, tool_calls

    def models(self) -> str:
        names = [entry.id for entry in self.client.models.list()]
        if self.model not in names:
            raise Failed(f"the list has {', '.join(names) or 'nothing'}, not {self.model}")
        return ", ".join(names)

    def is_refused(self, message: str) -> bool:
        """Whether a proxy before the endpoint lets this address not in, and says so with this message."""
        try:
            self.client.models.list()
        except openai.PermissionDeniedError as error:
            return isinstance(error.body, dict) and error.body.get("message") == message
        except openai.OpenAIError:
            pass  # which the checks tell of
        return False

    def completion(self) -> str:
        answer = self.client.completions.create(model=self.model, prompt=PROMPT, max_tokens=8, temperature=0)
        return self._told(answer.choices[0].text)

    def _chat(self, **extra: Any) -> Any:
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 16,
            "temperature": 0,
        }
        try:
            return self.client.chat.completions.create(**{**request, **extra})
        except openai.BadRequestError as error:
            if "chat template" in str(error):
                raise NotOffered("the model has no chat template") from None
            raise

    def chat(self) -> str:
        return self._told(self._said(self._chat().choices[0].message))

    def stream(self) -> str:
        answer, finish, count = "", None, 0
        for chunk in self._chat(stream=True):
            count += 1
            for choice in chunk.choices:
                answer += self._said(choice.delta)
                finish = choice.finish_reason or finish
        self._told(answer)
        if finish is None:
            raise Failed(f"the stream broke off after {count} events")
        return f"{count} events"

    def tool_call(self) -> str:
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"What is the weather in {CITY}?"}]
        try:
            message = self._forced_call(messages)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if self.tool_calls:
                raise
            raise NotOffered(str(error)) from None
        if not message.tool_calls:
            raise Failed("the answer has no tool call")
        (call, *_) = message.tool_calls
        try:
            arguments = json.loads(call.function.arguments)
        except ValueError:
            raise Failed(f"the tool call's arguments are no JSON: {call.function.arguments[:200]!r}") from None
        if call.function.name != TOOL["function"]["name"] or arguments != {"city": CITY}:
            raise Failed(f"the tool call is {call.function.name}({arguments})")
        called = {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": json.dumps(arguments)},
        }
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [called]},
            {"role": "tool", "tool_call_id": call.id, "content": "4 degrees, rain"},
        ]
        answer = self._said(self._chat(messages=messages, tools=[TOOL]).choices[0].message)
        return f"{call.function.name}({arguments['city']}), then {self._told(answer)!r}"

    def _forced_call(self, messages: list[dict[str, Any]]) -> Any:
        """The message with the call. A model that is cut off while it thinks is asked again, with more tokens."""
        answer = self._ask_call(messages, CALL_TOKENS)
        if not self._cut_off_thinking(answer.choices[0], or_later=True):
            return answer.choices[0].message
        room = next(
            (getattr(entry, "max_model_len", 0) for entry in self.client.models.list() if entry.id == self.model), 0
        )
        limit = min(THINKING_TOKENS, room - answer.usage.prompt_tokens) if room and answer.usage else THINKING_TOKENS
        after = f"{limit} tokens"
        try:
            choice = self._ask_call(messages, limit).choices[0]
            if not self._cut_off_thinking(choice):
                return choice.message
        except openai.APITimeoutError:
            after = "the time that a request has"
        raise NotJudged(f"the model was still thinking after {after}")

    def _ask_call(self, messages: list[dict[str, Any]], limit: int) -> Any:
        # Not greedy: a model that is undecided would write blanks between the brackets for ever.
        request = {"messages": messages, "tools": [TOOL], "temperature": 1, "seed": 0, "max_tokens": limit}
        try:
            return self._chat(
                tool_choice={"type": "function", "function": {"name": TOOL["function"]["name"]}}, **request
            )
        except openai.InternalServerError:
            # vLLM fails at a forced call that ends while the model thinks (vllm-project/vllm#40147). What it thinks is the same
            # without the force.
            answer = self._chat(tool_choice="none", **request)
            if not self._cut_off_thinking(answer.choices[0]):
                raise
            return answer

    def _cut_off_thinking(self, choice: Any, or_later: bool = False) -> bool:
        """Whether the tokens ended while the model thought, or in what came after its thoughts."""
        if choice.finish_reason != "length" or not self._thought(choice.message):
            return False
        calls = choice.message.tool_calls or []
        return or_later or not (choice.message.content or any(call.function.arguments for call in calls))

    def embeddings(self) -> str:
        data = self.client.embeddings.create(model=self.model, input=TEXTS).data
        vectors = [entry.embedding for entry in data]
        if len(vectors) != len(TEXTS) or len({len(vector) for vector in vectors}) != 1:
            raise Failed(f"{len(TEXTS)} texts gave vectors of the lengths {[len(vector) for vector in vectors]}")
        if not all(math.isfinite(x) for vector in vectors for x in vector):
            raise Failed("a vector holds what is no number")
        same, other = cosine(vectors[0], vectors[1]), cosine(vectors[0], vectors[2])
        if same < 0.99 or other >= same:
            raise Failed(f"equal texts have a similarity of {same:.3f}, different ones of {other:.3f}")
        return f"{len(vectors[0])} dimensions; equal texts {same:.3f}, different ones {other:.3f}"

    def rerank(self) -> str:
        body = {"model": self.model, "query": "Where does the cat sleep?", "documents": TEXTS[1:]}
        results = self.client.post("/rerank", cast_to=object, body=body)["results"]
        scores = [(entry["index"], float(entry["relevance_score"])) for entry in results]
        if sorted(index for index, _ in scores) != list(range(len(TEXTS) - 1)):
            raise Failed(f"{len(TEXTS) - 1} documents gave {results}")
        if scores != sorted(scores, key=lambda entry: -entry[1]) or not all(
            math.isfinite(score) for _, score in scores
        ):
            raise Failed(f"the documents are not in the order of their scores: {scores}")
        return ", ".join(f"document {index}: {score:.3f}" for index, score in scores)

    def wrong_key(self) -> str:
        try:
            self.client.with_options(api_key=WRONG_KEY).models.list()
        except openai.AuthenticationError:
            return "refused"
        raise Failed("a wrong key was let in")

    @staticmethod
    def _thought(message: Any) -> str:
        # Under a name that changed.
        return getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""

    def _said(self, message: Any) -> str:
        # A reasoning model may spend all its tokens on thinking.
        return message.content or self._thought(message)

    @staticmethod
    def _told(answer: str) -> str:
        if not answer.strip():
            raise Failed("the answer is empty")
        return answer.strip()

    def check(self, name: str) -> dict[str, Any]:
        start = time.monotonic()
        try:
            ok, detail = True, getattr(self, name)()
        except (NotOffered, NotJudged) as error:
            ok, detail = True, f"{error.kind}: {error}"
        except (Failed, openai.OpenAIError) as error:
            ok, detail = False, str(error)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            ok, detail = False, f"the answer has not the form of the OpenAI API: {error!r}"
        return {"name": name, "ok": ok, "detail": detail[:300], "ms": round(1000 * (time.monotonic() - start))}


def told(check: dict[str, Any]) -> str:
    """A check that has passed, and whether as a proof."""
    kind = next((kind for kind in (NotOffered.kind, NotJudged.kind) if check["detail"].startswith(f"{kind}: ")), "")
    return f"{check['name']} ({kind})" if kind else check["name"]


def is_own(host: str) -> bool:
    """Whether an address is one that only the machine itself reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


class ActionModule(ActionBase):
    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        self._variables = task_vars
        _, params = self.validate_argument_spec(
            argument_spec={
                "base_url": {"type": "str", "required": True},
                "api_key_file": {"type": "path", "required": True, "no_log": False},
                "model": {"type": "str", "required": True},
                "task": {"type": "str", "choices": list(CHECKS), "default": "generate"},
                "tool_calls": {"type": "bool", "default": False},
                "ca_pem": {"type": "str"},
                "refusal": {"type": "str", "default": ""},
                "required": {"type": "bool", "default": False},
                "timeout": {"type": "int", "default": 120},
            }
        )
        result.update(changed=False, checks=[], via="", sdk="")
        url = urlsplit(params["base_url"])
        if url.scheme not in ("http", "https") or not url.hostname or not url.path.rstrip("/").endswith("/v1"):
            raise AnsibleActionFail(
                f"base_url is {params['base_url']!r}: give the address up to and with /v1, such as http://127.0.0.1:8000/v1"
            )
        if self._task.check_mode:
            return {
                **result,
                "skipped": True,
                "msg": "nothing is sent in check mode",
                "told": "not asked in check mode",
            }
        if openai is None:
            missing = "openai is not installed for the Python that runs Ansible: pip install openai (requirements.txt)"
            return {
                **result,
                "failed": params["required"],
                "skipped": not params["required"],
                "msg": missing,
                "told": missing,
            }
        result["sdk"] = openai.__version__
        key = self._read(params["api_key_file"], secret=True).strip()
        try:
            with self._way(url) as (address, via):
                result["via"] = via
                result["checks"] = self._prove(params, url, address, key)
        except Unreachable as error:
            said = {"msg": str(error), "told": str(error)}
            return {**result, "failed": params["required"], "skipped": not params["required"], **said}
        for check in result["checks"]:
            check["detail"] = check["detail"].replace(key, "********")
        if failed := [f"{check['name']} ({check['detail']})" for check in result["checks"] if not check["ok"]]:
            return {
                **result,
                "failed": True,
                "msg": f"{params['base_url']} does not hold for the openai SDK: {'; '.join(failed)}",
            }
        result["told"] = ", ".join(map(told, result["checks"]))
        return result

    def _prove(self, params: dict[str, Any], url: Any, address: tuple[str, int], key: str) -> list[dict[str, Any]]:
        verify: Any = True
        if url.scheme == "https":
            verify = ssl.create_default_context(cadata=params["ca_pem"])
            # Through a forwarding the name is another one; the certificate must still be the right one.
            verify.check_hostname = address[0] == url.hostname
        name = f"[{address[0]}]" if ":" in address[0] else address[0]
        base_url = urlunsplit((url.scheme, f"{name}:{address[1]}", url.path, "", ""))
        # A host that this play manages is not behind the controller's proxy.
        with openai.DefaultHttpxClient(verify=verify, trust_env=False, timeout=params["timeout"]) as transport:
            client = openai.OpenAI(
                base_url=base_url, api_key=key, max_retries=0, timeout=params["timeout"], http_client=transport
            )
            proof = Proof(client, params["model"], params["tool_calls"])
            if params["refusal"] and proof.is_refused(params["refusal"]):
                raise Unreachable(
                    f"{params['base_url']} was not asked: it does not let the address in that the controller comes from"
                )
            return [proof.check(name) for name in CHECKS[params["task"]]]

    def _read(self, path: str, secret: bool = False) -> str:
        """A file of the host. What is secret is in no output, however verbose: the connection prints what it is told to."""
        verbose, self._play_context.no_log = self._play_context.no_log, secret or self._play_context.no_log
        task, self._task.no_log = self._task.no_log, secret or self._task.no_log
        try:
            answer = self._execute_module(
                module_name="ansible.legacy.slurp", module_args={"src": path}, task_vars=self._variables
            )
        finally:
            self._play_context.no_log, self._task.no_log = verbose, task
        if answer.get("failed"):
            raise AnsibleActionFail(f"cannot read {path}: {answer.get('msg', 'no reason given')}")
        return base64.b64decode(answer["content"]).decode("utf-8", "replace")

    @contextlib.contextmanager
    def _way(self, url: Any) -> Iterator[tuple[tuple[str, int], str]]:
        """The address at which the controller reaches the endpoint, while the block runs, and how."""
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        transport = self._connection.transport
        if transport == "local" or (not is_own(url.hostname) and answers(url.hostname, port)):
            yield (url.hostname, port), "direct"
        elif transport.rpartition(".")[2] == "ssh":
            with self._forwarding(url.hostname, port) as here:
                yield ("127.0.0.1", here), "ssh"
        else:
            raise Unreachable(
                f"{url.hostname}:{port} is not reached from the controller, and the connection {transport} forwards no ports: "
                "what was proved on the host has to do"
            )

    @contextlib.contextmanager
    def _forwarding(self, host: str, port: int) -> Iterator[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            here = probe.getsockname()[1]
        target = f"127.0.0.1:{here}:{f'[{host}]' if ':' in host else host}:{port}"
        self._ssh("forward", target)
        try:
            yield here
        finally:
            with contextlib.suppress(Unreachable):
                self._ssh("cancel", target)

    def _ssh(self, request: str, target: str) -> None:
        """Asks the shared connection that this play has open."""
        ssh = self._connection
        program = ssh.get_option("ssh_executable")
        words = [word.decode() for word in ssh._build_command(program, "ssh", "-O", request, "-L", target, ssh.host)]
        # Without what would type a password: the connection is open already.
        done = subprocess.run(
            words[words.index(program) :], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Unreachable(
                f"{target.split(':', 2)[2]} of the host is not reached from the controller: ssh -O {request} says "
                f"{' '.join(done.stderr.split())[:200]!r}; it needs ControlPersist"
            )

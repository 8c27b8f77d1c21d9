# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan for people: as text with bars, and as one self-contained HTML page."""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH = 60
# What a GPU's memory goes to: key, words, letter in the text's bar, colour on the page (told apart in grey, too).
PARTS = (
    ("weights_gib", "weights", "W", "#31688e"),
    ("kv_cache_gib", "KV cache", "K", "#35b779"),
    ("activation_gib", "activations", "a", "#fde725"),
    ("cuda_graph_gib", "CUDA graphs", "g", "#d08a2e"),
    ("warmup_gib", "warm-up", "w", "#c96a4f"),
    ("non_torch_gib", "libraries", "n", "#9b5fa5"),
    ("outside_gib", "CUDA context", "c", "#6e4a7e"),
)
OTHERS = ("in use by others", "x", "#888888")
Plan = Mapping[str, Any]


def bar(parts: Sequence[tuple[str, float]], total: float, width: int = WIDTH) -> str:
    """``WWWWKKKK....``: each letter's share of ``total``; what is left is dots. Never longer than ``width``.

    Ends are rounded, not lengths, so that the parts add up.
    """
    text = ""
    reached = 0.0
    for letter, size in parts:
        reached += max(0.0, size)
        text += letter * max(0, round(width * min(1.0, reached / total)) - len(text))
    return text.ljust(width, ".")


def command_of(service: Plan) -> str:
    """The server's command line with its environment, as a shell takes it (an image has its first words built in)."""
    env = [f"{name}={shlex.quote(value)}" for name, value in sorted(service["env"].items())]
    return " ".join([*env, *(shlex.quote(str(arg)) for arg in [*service["command"], *service["args"]])])


def _where(service: Plan) -> str:
    """ "gpu1 (GPU 0, 1), gpu2 (GPU 0)"."""
    return ", ".join(
        f"{host} (GPU {', '.join(map(str, service['gpus'][host]))})" if service["gpus"].get(host) else f"{host} (CPU)"
        for host in service["hosts"]
    )


def _memory(service: Plan) -> str:
    """ "weights 15.41, KV cache 2.77 = 18.18 GiB on each GPU"."""
    memory = service["memory"]
    parts = ", ".join(f"{words} {memory[key]:.2f}" for key, words, _, _ in PARTS if memory[key])
    return f"{parts} = {memory['footprint_gib']:.2f} GiB{' on each GPU' if service['gpus'] else ''}"


def _context(service: Plan) -> str:
    memory = service["memory"]
    text = f"{service['max_model_len']} tokens a request, {service['max_num_seqs']} requests at most"
    if not memory["kv_cache_tokens"]:
        return f"{text}, no cache needed"
    return (
        f"{text}, cache for {memory['kv_cache_tokens']} tokens: {memory['max_concurrency']:.2f} full requests at once"
    )


def _layout(service: Plan) -> str:
    sizes = [
        f"{word} {service[key]}"
        for word, key in (
            ("TP", "tensor_parallel_size"),
            ("PP", "pipeline_parallel_size"),
            ("DP", "data_parallel_size"),
        )
    ]
    return " x ".join(sizes) + (", experts spread" if service["enable_expert_parallel"] else "")


def as_text(plan: Plan) -> str:
    """The plan as lines: for each service verdict, memory, command line and reasons; then each GPU as a bar."""
    lines: list[str] = []
    for service in plan["services"]:
        lines += [f"{service['name']}: {service['model']}  [{'fits' if service['fits'] else 'DOES NOT FIT'}]"]
        lines += [f"  problem: {problem}" for problem in service["problems"]]
        if service["instances"]:
            where = (
                f"vLLM {service['engine_version']} {service['engine_core']}, {service['device']}, {service['runtime']}"
            )
            lines += [
                f"  on       {_where(service)}",
                f"  layout   {_layout(service)}, {where}",
                f"  context  {_context(service)}",
                f"  memory   {_memory(service)}",
            ]
            if service.get("image"):
                lines.append(f"  image    {service['image']}")
            lines.append(f"  command  {command_of(service)}")
        lines += [f"  why      {reason}" for reason in service["why"]]
        lines.append("")
    for gpu in plan["gpus"]:
        lines += _gpu_text(gpu)
    if plan["gpus"]:
        legend = ", ".join(f"{letter} {words}" for _, words, letter, _ in PARTS)
        lines += [f"  {legend}, {OTHERS[1]} {OTHERS[0]}, . free", ""]
    lines.append(
        "Everything fits." if plan["fits"] else f"{len(plan['problems'])} problem(s): nothing should be started."
    )
    return "\n".join(lines)


def _gpu_text(gpu: Plan) -> list[str]:
    """Two lines for a GPU nobody shares, one more for each service on it."""
    parts = [(OTHERS[1], gpu["used_by_others_gib"])]
    for service in gpu["services"]:
        parts += [(letter, service[key]) for key, _, letter, _ in PARTS]
    lines = [
        f"{gpu['host']} GPU {gpu['index']}  {gpu['name']}  {gpu['total_gib']:.2f} GiB, {gpu['free_gib']:.2f} free",
        f"  [{bar(parts, gpu['total_gib'])}]",
    ]
    if len(gpu["services"]) > 1:
        for service in gpu["services"]:
            own = bar([(letter, service[key]) for key, _, letter, _ in PARTS], gpu["total_gib"])
            lines.append(f"  [{own}] {service['service']} {service['total_gib']:.2f} GiB")
    elif gpu["services"]:
        lines[-1] += f" {gpu['services'][0]['service']}"
    return lines


# ----------------------------------------------------------------------------------------------------------- page

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1d1d1f;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .4rem;border-bottom:1px solid #ccc}
.verdict{display:inline-block;padding:.1rem .6rem;border-radius:1rem;font-size:.85rem;color:#fff;background:#1b7a3d}
.verdict.no{background:#b3261e}
.problem{background:#fdecea;border-left:4px solid #b3261e;padding:.4rem .8rem;margin:.4rem 0}
.gpu{display:grid;grid-template-columns:15rem 1fr 9rem;gap:.8rem;align-items:center;margin:.35rem 0}
.gpu small{color:#555}.bar{display:flex;height:1.7rem;border:1px solid #777;background:#f3f3f3;overflow:hidden}
.bar span{display:block;height:100%;border-right:1px solid #fff8;box-sizing:border-box}
.bar span.edge{border-right:3px solid #000}
.legend span{display:inline-block;margin-right:1.1rem;white-space:nowrap}
.legend i{display:inline-block;width:.9rem;height:.9rem;margin-right:.35rem;vertical-align:-.1rem;border:1px solid #777}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
th{font-weight:600;white-space:nowrap}pre{background:#f4f4f6;padding:.7rem;white-space:pre-wrap;overflow-wrap:anywhere}
ul{margin:.3rem 0;padding-left:1.2rem}
@media (max-width:48rem){.gpu{grid-template-columns:1fr}}
"""


def _span(words: str, size: float, total: float, colour: str, edge: bool = False) -> str:
    if size <= 0:
        return ""
    style = f"width:{100 * size / total:.3f}%;background:{colour}"
    return f'<span{" class=edge" if edge else ""} style="{style}" title="{escape(words)}: {size:.2f} GiB"></span>'


def _gpu_html(gpu: Plan) -> str:
    total = gpu["total_gib"]
    spans = _span(OTHERS[0], gpu["used_by_others_gib"], total, OTHERS[2])
    for service in gpu["services"]:
        for key, words, _, colour in PARTS:
            spans += _span(f"{service['service']}: {words}", service[key], total, colour, edge=key == PARTS[-1][0])
    names = ", ".join(service["service"] for service in gpu["services"]) or "nobody"
    return (
        f'<div class="gpu"><div>{escape(gpu["host"])} GPU {gpu["index"]}<br><small>{escape(gpu["name"])}: '
        f'{escape(names)}</small></div><div class="bar" role="img" aria-label="{escape(_aria(gpu))}">{spans}</div>'
        f"<small>{gpu['free_gib']:.2f} of {total:.2f} GiB free</small></div>"
    )


def _aria(gpu: Plan) -> str:
    parts = [f"{service['service']} {service['total_gib']:.2f} GiB" for service in gpu["services"]]
    return ", ".join([*parts, f"free {gpu['free_gib']:.2f} GiB"])


def _service_html(service: Plan) -> str:
    verdict = "" if service["fits"] else " no"
    html = [
        f'<h2>{escape(service["name"])} <span class="verdict{verdict}">{"fits" if service["fits"] else "does not fit"}'
        f"</span></h2>",
        *(f'<div class="problem">{escape(problem)}</div>' for problem in service["problems"]),
    ]
    rows = [("model", service["model"]), ("objective", service["objective"])]
    if service["instances"]:
        rows += [
            ("on", _where(service)),
            ("layout", _layout(service)),
            (
                "engine",
                f"vLLM {service['engine_version']} {service['engine_core']}, {service['device']}, {service['runtime']}",
            ),
            ("image", service.get("image") or ""),
            ("context", _context(service)),
            ("memory", _memory(service)),
        ]
    table = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in rows if value)
    html.append(f"<table>{table}</table>")
    if service["instances"]:
        html.append(f"<pre>{escape(command_of(service))}</pre>")
    html.append("<ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in service["why"]) + "</ul>")
    return "\n".join(html)


def as_html(plan: Plan, title: str = "vLLM plan") -> str:
    """The plan as one page that needs nothing else: a stacked bar for each GPU, then each service."""
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(words)}</span>'
        for words, colour in [
            *((words, colour) for _, words, _, colour in PARTS),
            (OTHERS[0], OTHERS[2]),
            ("free", "#f3f3f3"),
        ]
    )
    verdict = (
        '<span class="verdict">everything fits</span>'
        if plan["fits"]
        else '<span class="verdict no">does not fit</span>'
    )
    gpus = "\n".join(_gpu_html(gpu) for gpu in plan["gpus"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{escape(title)} {verdict}</h1>
<p class="legend">{legend}</p>
{gpus}
{chr(10).join(_service_html(service) for service in plan["services"])}
</body>
</html>
"""

# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters vllm_plan, plan_hosts, plan_text and plan_html, called through Ansible's templating."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleError
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

SERVICES = [{"name": "chat", "model": "Qwen/Qwen2.5-7B-Instruct", "max_model_len": 4096}]


def render(template: str, **variables: Any) -> Any:
    try:
        from ansible.template import trust_as_template

        template = trust_as_template(template)
    except ImportError:  # before ansible-core 2.19 every string was a template
        pass
    return Templar(loader=DataLoader(), variables=variables).template(template)


def test_a_plan_from_jinja() -> None:
    plan = render("{{ services | baremetal.vllm.vllm_plan('2x A10' | baremetal.vllm.plan_hosts) }}", services=SERVICES)
    assert plan["fits"], plan["problems"]
    assert plan["services"][0]["args"][0] == "Qwen/Qwen2.5-7B-Instruct"


def test_the_plan_as_text_and_as_a_page() -> None:
    for name, words in (("text", "chat: Qwen/Qwen2.5-7B-Instruct  [fits]"), ("html", "<h2>chat ")):
        planned = "services | baremetal.vllm.vllm_plan('2x A10' | baremetal.vllm.plan_hosts)"
        shown = render(f"{{{{ {planned} | baremetal.vllm.plan_{name} }}}}", services=SERVICES)
        assert words in shown


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ [] | baremetal.vllm.vllm_plan('A10' | baremetal.vllm.plan_hosts) }}", "vllm_plan: vllm_services is"),
        ("{{ services | baremetal.vllm.vllm_plan([]) }}", "vllm_plan: hosts is .*give at least one host"),
        ("{{ services | baremetal.vllm.vllm_plan(5) }}", "vllm_plan: hosts is 5; give a list"),
        ("{{ '4x A11' | baremetal.vllm.plan_hosts }}", "plan_hosts: plan_gpus is '4x A11'; the catalog has no GPU"),
        ("{{ services | baremetal.vllm.plan_text }}", "plan_text: the input is .*give it what vllm_plan returned"),
        ("{{ {} | baremetal.vllm.plan_html }}", "plan_html: the input is .*give it what vllm_plan returned"),
    ],
)
def test_bad_input_is_one_error_that_names_it(template: str, text: str) -> None:
    with pytest.raises(AnsibleError, match=text):
        render(template, services=SERVICES)

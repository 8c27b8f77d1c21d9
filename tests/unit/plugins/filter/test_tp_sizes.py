# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter tp_sizes, called through Ansible's templating."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleError
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648, "vocab_size": 152064,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def render(template: str, **variables: Any) -> Any:
    try:
        from ansible.template import trust_as_template

        template = trust_as_template(template)
    except ImportError:  # before ansible-core 2.19 every string was a template
        pass
    return Templar(loader=DataLoader(), variables=variables).template(template)


def test_sizes_from_jinja() -> None:
    assert render("{{ config | baremetal.vllm.tp_sizes(max=16) }}", config=QWEN) == [1, 2, 4, 8]
    assert render("{{ config | baremetal.vllm.tp_sizes }}", config=QWEN) == [1, 2, 4, 8]
    assert render("{{ config | baremetal.vllm.tp_sizes(max=2) }}", config=QWEN) == [1, 2]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ config | baremetal.vllm.tp_sizes(max=0) }}", "tp_sizes: max is 0; give a whole number of at least 1"),
        ("{{ config | baremetal.vllm.tp_sizes(max='8') }}", "tp_sizes: max is '8'; give a whole number"),
        ("{{ 'text' | baremetal.vllm.tp_sizes }}", "tp_sizes: config is 'text'; give the content of a model's"),
        ("{{ {} | baremetal.vllm.tp_sizes }}", "tp_sizes: config is {}; it is empty"),
        ("{{ {'model_type': 'llama'} | baremetal.vllm.tp_sizes }}", "tp_sizes: config.hidden_size is None; "),
        (
            "{{ dict(config, num_hidden_layers=-1) | baremetal.vllm.tp_sizes }}",
            "config.num_hidden_layers is -1; ",
        ),
    ],
)
def test_bad_input_is_one_error_that_names_it(template: str, text: str) -> None:
    with pytest.raises(AnsibleError, match=text):
        render(template, config=QWEN)

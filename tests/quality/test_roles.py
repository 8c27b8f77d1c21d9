# SPDX-License-Identifier: GPL-3.0-or-later
"""Each role is described as it is: argument_specs against defaults, names, and no variable that nothing reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ansible.modules
import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from jinja2 import Environment, nodes

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
WORD = re.compile(r"\b[A-Za-z_]\w*\b")


class Loader(yaml.SafeLoader):
    """Reads tags of Ansible (!unsafe, !vault) as the plain text behind them."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: loader.construct_scalar(node))


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader) if path.exists() else None


def specs(role: str) -> dict[str, Any]:
    return (load(ROOT / "roles" / role / "meta" / "argument_specs.yml") or {}).get("argument_specs", {})


def defaults(role: str) -> dict[str, Any]:
    return load(ROOT / "roles" / role / "defaults" / "main.yml") or {}


def test_there_are_roles() -> None:
    assert ROLES


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["README.md", "meta/main.yml", "meta/argument_specs.yml", "tasks/main.yml"])
def test_role_has(role: str, name: str) -> None:
    assert (ROOT / "roles" / role / name).is_file()


@pytest.mark.parametrize("role", ROLES)
def test_every_entry_point_is_described(role: str) -> None:
    """A file below tasks/ that playbooks and other roles call by name checks its arguments, too."""
    called = {"main"}
    for path in (*ROOT.glob("playbooks/**/*.yml"), *ROOT.glob("roles/*/tasks/*.yml")):
        for task in mappings(load(path)):
            for action in ("include_role", "import_role"):
                asked = task.get(f"ansible.builtin.{action}") or {}
                if asked.get("name") == f"baremetal.vllm.{role}":
                    called.add(asked.get("tasks_from", "main"))
    assert called <= set(specs(role)), f"meta/argument_specs.yml lacks {sorted(called - set(specs(role)))}"


@pytest.mark.parametrize("role", ROLES)
def test_argument_specs_equal_defaults(role: str) -> None:
    described: dict[str, Any] = {}
    for entry, spec in specs(role).items():
        for name, option in spec.get("options", {}).items():
            if not option.get("required"):
                assert described.setdefault(name, option.get("default")) == option.get("default"), f"{name} of {entry}"
    assert described == defaults(role)


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_what_their_types_allow(role: str) -> None:
    """By Ansible's own validation. What is a template is known at run time only."""
    options = {name: option for spec in specs(role).values() for name, option in spec.get("options", {}).items()}
    fixed = {name: value for name, value in defaults(role).items() if "{{" not in str(value)}
    keys = ("type", "elements", "choices", "options")
    spec = {
        name: {key: options[name][key] for key in keys if key in options[name]} for name in fixed if name in options
    }
    assert spec, "nothing to validate"
    result = ArgumentSpecValidator(spec).validate({name: fixed[name] for name in spec if fixed[name] is not None})
    assert not result.error_messages


@pytest.mark.parametrize("role", ROLES)
def test_options_have_a_type_and_a_description(role: str) -> None:
    for entry, spec in specs(role).items():
        assert spec.get("short_description"), entry
        for name, option in spec.get("options", {}).items():
            assert option.get("type"), f"{name} of {entry}"
            assert option.get("description"), f"{name} of {entry}"


@pytest.mark.parametrize("role", ROLES)
def test_names_carry_the_role(role: str) -> None:
    public = [name for name in defaults(role) if not name.startswith((f"{role}_", "baremetal_"))]
    internal = [
        name
        for path in (ROOT / "roles" / role / "vars").glob("*.yml")
        for name in load(path) or {}
        if not name.startswith(f"__{role}_")
    ]
    assert not public, f"defaults/main.yml: {public} should begin with {role}_ (or baremetal_)"
    assert not internal, f"vars: {internal} should begin with __{role}_"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_gives_its_own_options_no_other_value(role: str) -> None:
    """Extra variables (-e, a survey of AWX) are above those of a task, so that the user's value would stay."""
    given = {
        name
        for path in (ROOT / "roles" / role / "tasks").glob("*.yml")
        for task in mappings(load(path))
        for name in task.get("vars") or {}
    }
    assert not given & set(defaults(role))


@pytest.mark.parametrize("role", ROLES)
def test_a_role_does_not_register_over_its_variables(role: str) -> None:
    """What was registered, in any of its files, stays for the run and is above the variables of tasks, but for those of includes."""
    found = [task for path in (ROOT / "roles" / role / "tasks").glob("*.yml") for task in mappings(load(path))]
    own = [task for task in found if not {"ansible.builtin.include_tasks", "ansible.builtin.include_role"} & set(task)]
    given = {name for task in own for name in task.get("vars") or {}}
    assert given.isdisjoint(task["register"] for task in found if isinstance(task.get("register"), str))


# ---- variables that nothing reads ----

DEFINING = ("vars", "ansible.builtin.set_fact")  # keys of these are names of variables
NAMING = ("register", "loop_var", "index_var")  # values of these are


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from mappings(child)


def words(node: Any, defined: dict[str, set[str]]) -> set[str]:
    """Words that tasks read. Variables that they define go to `defined` with the words of their value."""
    if isinstance(node, str):
        return set(WORD.findall(node))
    found: set[str] = set()
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in NAMING:
            defined[value] |= set()
        elif key in DEFINING and isinstance(value, dict):
            for name, content in value.items():
                defined[name] |= words(content, defined)
        else:
            found |= words(value, defined)
    return found


def unread(root: Path) -> list[str]:
    """Variables of roles' defaults and vars, and internal ones of tasks, that no task, template or playbook reads.

    A variable that only an unread one reads is unread, too.
    """
    defined: dict[str, set[str]] = defaultdict(set)
    judged: set[str] = set()
    read: set[str] = set()
    for path in (*root.glob("roles/*/defaults/*.yml"), *root.glob("roles/*/vars/*.yml")):
        for name, value in (load(path) or {}).items():
            judged.add(name)
            defined[name] |= words(value, defaultdict(set))
    tasks = ("roles/*/tasks/**/*.yml", "roles/*/handlers/*.yml", "playbooks/**/*.yml", "inventories/**/*.yml")
    for path in (path for pattern in tasks for path in root.glob(pattern)):
        read |= words(load(path), defined)
    for path in root.glob("roles/*/templates/**/*.j2"):
        read |= set(WORD.findall(path.read_text()))
    judged |= {name for name in defined if name.startswith("__")}
    todo = [name for name in defined if name in read]
    while todo:
        new = defined[todo.pop()] - read
        read |= new
        todo += [name for name in new if name in defined]
    return sorted(judged - read)


def test_what_a_site_sets_for_all_of_ansible_restarts_no_server() -> None:
    """A site's ansible_managed may hold a time or a user's name: files would differ at each run."""
    found = [path for path in (ROOT / "roles").rglob("*") if path.is_file() and "ansible_managed" in path.read_text()]
    assert not found


def test_no_dead_variables() -> None:
    assert unread(ROOT) == []


def test_dead_variables_are_found(tmp_path: Path) -> None:
    for name, text in {
        "roles/r/defaults/main.yml": "r_used: 1\nr_dead: 2\nr_behind: 3\n",
        "roles/r/vars/main.yml": "__r_dead: '{{ r_behind }}'\n__r_by_template: 4\n",
        "roles/r/tasks/main.yml": (
            "- name: One\n  ansible.builtin.debug:\n    msg: '{{ r_used }}'\n  register: __r_result\n"
            "- name: Two\n  ansible.builtin.set_fact:\n    __r_fact: '{{ r_used }}'\n"
        ),
        "roles/r/templates/a.j2": "{{ __r_by_template }}",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert unread(tmp_path) == ["__r_dead", "__r_fact", "__r_result", "r_behind", "r_dead"]


@pytest.mark.parametrize("role", ROLES)
def test_no_task_hides_a_variable_of_the_role(role: str) -> None:
    """What set_fact and register name wins over vars/main.yml from then on, in all files of the role."""
    known = {
        name
        for path in (ROOT / "roles" / role / "vars").glob("*.yml")
        for name, value in (load(path) or {}).items()
        if isinstance(value, str) and "{{" in value
    }
    named = {
        name
        for path in (ROOT / "roles" / role / "tasks").glob("*.yml")
        for task in mappings(load(path))
        for name in (*(task.get("ansible.builtin.set_fact") or {}), task.get("register"))
    }
    assert not known & named


# ---- values that come as text: by -e name=value, by a survey of AWX, by an INI inventory ----

TASKS = ("roles/*/handlers", "roles/*/tasks", "playbooks")
VARIABLES = ("roles/*/defaults", "roles/*/vars", "inventories")
CONDITIONS = ("when", "that", "until", "failed_when", "changed_when")  # values of these are expressions without braces
# Filter -> types of the options that are what they should be after it.
CONVERTING = {
    "bool": ("bool",), "int": ("int",), "float": ("int", "float"), "string": ("int", "float"), "baremetal.vllm.listed": ("list",),
}  # fmt: skip
# Role vllm gives the nodes of Ray their lists, as lists.
GIVEN = {f"ray_cluster_{name}" for name in ("hosts", "gpus", "allowed_networks", "container_options")}


def typed() -> dict[str, str]:
    """Options that are no text. The specs of roles check what they get and convert nothing."""
    options = [spec.get("options", {}) for role in ROLES for spec in specs(role).values()]
    types = {name: option["type"] for some in options for name, option in some.items()}
    lists = {name for some in options for name, option in some.items() if option.get("elements") in ("str", "int")}
    return {name: kind for name, kind in types.items() if kind in ("bool", "int", "float") or name in lists - GIVEN}


def named(node: Any) -> Any:
    """The variable that a node names: by itself, in hostvars, or by a word for `extract` and its like."""
    return getattr(node, {nodes.Name: "name", nodes.Getattr: "attr", nodes.Const: "value"}.get(type(node), ""), None)


def mentions(template: str, types: dict[str, str], is_text: bool) -> Iterator[tuple[str, bool]]:
    """Each mention of an option, and whether it is the same there whether it came as text or not."""
    tree, good = Environment().parse(template), set()
    for node in tree.find_all((nodes.Filter, nodes.Concat, nodes.Output)):
        operands, allowed = getattr(node, "nodes", []), ("int", "float")  # numbers are written as they were given
        if isinstance(node, nodes.Filter):
            operand, allowed = node.node, CONVERTING.get(node.name, ())
            while isinstance(operand, nodes.Filter) and operand.name == "default":
                operand = operand.node
            operands = [operand]
        elif len(operands) == 1 and not is_text:  # handed on as a value
            continue
        good |= {id(operand) for operand in operands if types.get(named(operand)) in allowed}
    for node in tree.find_all((nodes.Name, nodes.Getattr, nodes.Const)):
        if named(node) in types:
            yield named(node), id(node) in good


def templates(node: Any, tasks: bool, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every template, and the keys that lead to it."""
    if isinstance(node, str):
        yield f"{{{{ {node} }}}}" if tasks and keys[-1] in CONDITIONS else node, keys
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from templates(value, tasks, (*keys, str(key)))
    for value in node if isinstance(node, list) else ():
        yield from templates(value, tasks, keys)


@cache
def module_options(name: str) -> dict[str, Any]:
    folder = ROOT / "plugins/modules" if name.startswith("baremetal.vllm.") else Path(ansible.modules.__path__[0])
    text = (folder / f"{name.rsplit('.', 1)[1]}.py").read_text()
    return yaml.safe_load(re.findall(r"^DOCUMENTATION = r?(\"{3}|'{3})(.*?)\1", text, re.S | re.M)[0][1])["options"]


def converted_by_module(template: str, keys: tuple[str, ...], kind: str) -> bool:
    """A value that is nothing but the option, for an argument of a module that is of its type."""
    if len(keys) < 2 or not keys[-2].startswith(("ansible.builtin.", "baremetal.vllm.")):
        return False
    alone = re.fullmatch(r"\{\{ \w+ \}\}", template.strip())
    return bool(alone) and module_options(keys[-2]).get(keys[-1], {}).get("type") == kind


def taken_for_granted(root: Path, types: dict[str, str]) -> tuple[list[str], set[str]]:
    """Where options are used as if their values were of their types; and the options that were seen at all."""
    found, seen = [], set()
    tasks = {path for folder in TASKS for path in root.glob(f"{folder}/**/*.yml")}
    variables = {path for folder in VARIABLES for path in root.glob(f"{folder}/**/*.yml")}
    for path in sorted({*tasks, *variables, *root.glob("roles/*/templates/**/*.j2")}):
        is_text = path.suffix == ".j2"
        for template, keys in [(path.read_text(), ())] if is_text else templates(load(path), path in tasks):
            for name, good in mentions(template, types, is_text):
                seen.add(name)
                if not good and not converted_by_module(template, keys, types[name]):
                    found.append(
                        f"{path.relative_to(root)}: {name} ({types[name]}) in {' '.join(template.split())[:200]}"
                    )
    return found, seen


def test_no_type_of_an_option_is_taken_for_granted() -> None:
    types = typed()
    found, seen = taken_for_granted(ROOT, types)
    assert found == []
    assert seen == set(types)


BAD: list[Any] = [
    {"when": "r_on"},
    {"when": ["x", "not r_on and y | bool"]},
    {"when": "r_on | default(false)"},
    {"block": [{"when": "r_n | bool"}]},
    {"until": "x == r_n"},
    {"failed_when": "x > r_x | int"},
    {"ansible.builtin.assert": {"that": ["r_x < 0"]}},
    {"ansible.builtin.set_fact": {"x": "{{ r_n }}"}},
    {"ansible.builtin.wait_for": {"host": "{{ r_n }}"}},
    {"ansible.builtin.wait_for": {"port": "{{ r_x }}"}},
    {"ansible.builtin.wait_for": {"port": "{{ r_n + 1 }}"}},
    {"retries": "{{ [r_n // 5, 1] | max }}"},
    {"loop": "{{ range(r_n) }}"},
    "{{ r_n }}",
    "{{ r_on }} it is",
    "{{ r_on | string }}",
    "{{ 1 if r_on else 2 }}",
    "{{ 2 * r_n }}",
    "{{ {'a': r_n} }}",
    "{{ x | f(r_on) }}",
    "{{ x | default(r_n) }}",
    "{{ hostvars.h.r_on }}",
    "{{ x | map('extract', hostvars, 'r_n') }}",
    "{% if r_on %}{% endif %}",
    "{% set x = r_n %}",
    "{{ r_l }}",
    "{{ x + r_l }}",
    "{{ r_l | map('string') | baremetal.vllm.listed }}",
    "{{ 1 if r_l else 2 }}",
    {"loop": "{{ r_l }}"},
]
GOOD: list[Any] = [
    {"when": "not r_on | default(true) | bool and r_n | int > 1 or x < r_x | float"},
    {"ansible.builtin.wait_for": {"port": "{{ r_n }}"}},
    {"ansible.builtin.debug": {"msg": "r_n is {{ r_n }}"}},
    {"baremetal.vllm.preflight_probe": {"urls": "{{ r_l }}"}},
    {"when": "r_l | default([]) | baremetal.vllm.listed | length > 0"},
    "{{ '--n=' ~ r_n }}",
    "{{ [r_n | string, r_n | float] }}",
    "{% if r_on | bool %}{{ r_n }} of{% endif %}",
]


def test_what_is_taken_for_granted_is_found(tmp_path: Path) -> None:
    types = {"r_on": "bool", "r_n": "int", "r_x": "float", "r_l": "list"}
    for name, some in (("bad", BAD), ("good", GOOD)):
        for number, one in enumerate(some):
            path = tmp_path / "roles/r" / ("vars" if isinstance(one, str) else "tasks") / f"{name}{number}.yml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump({"__r": one} if isinstance(one, str) else [one]))
    # A file's template is text as a whole; what is no task has no conditions.
    (tmp_path / "roles/r/templates").mkdir()
    (tmp_path / "roles/r/templates/good.j2").write_text("{{ r_n }}")
    (tmp_path / "roles/r/templates/bad.j2").write_text("{{ r_n + 1 }}")
    (tmp_path / "roles/r/vars/good.yml").write_text("until: r_n\nwhen: what r_on is for\n")
    (tmp_path / "playbooks").mkdir()
    (tmp_path / "playbooks/bad.yml").write_text("- {hosts: all, tasks: [{when: r_on}]}\n")
    found, seen = taken_for_granted(tmp_path, types)
    assert seen == set(types)
    assert {line.split(":")[0] for line in found} == {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("bad*.*")
    }

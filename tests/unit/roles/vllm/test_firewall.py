# SPDX-License-Identifier: GPL-3.0-or-later
"""The unit that closes engines' ports: its place in a boot, by systemd's own judgement, and that its rules are put back."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from support import ROOT, run

TEMPLATE = ROOT / "roles/vllm/templates/interconnect-firewall.service.j2"
FIREWALL = "vllm-interconnect-firewall.service"
TARGETS = ("local-fs", "sysinit", "basic", "network-pre", "network", "network-online", "multi-user", "shutdown")
EARLY = "DefaultDependencies=no\nConflicts=shutdown.target\nBefore=shutdown.target\n"
# Stand in for the units that Ubuntu 22.04 and Debian 12 boot with: what each says of its order.
STANDINS = {
    "systemd-networkd.service": EARLY + "After=network-pre.target\nBefore=network.target\n",
    "systemd-networkd-wait-online.service": EARLY
    + "Requires=systemd-networkd.service\nAfter=systemd-networkd.service\n",
    "cloud-init.service": EARLY
    + "Wants=systemd-networkd-wait-online.service\nAfter=systemd-networkd-wait-online.service\n"
    + "Before=network-online.target sysinit.target\n",
    "nftables.service": EARLY + "Wants=network-pre.target\nBefore=network-pre.target\n",
}
WANTED = {"cloud-init.service": "multi-user.target", "nftables.service": "sysinit.target"}


def unit(folder: Path) -> str:
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(vllm_config_dir=str(folder))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_a_boot_with_cloud_init_has_no_circle_standin(tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    text = unit(tmp_path).replace("nft ", f"{shutil.which('true')} ")  # nftables may not be here
    (units / FIREWALL).write_text(text)
    for name, order in STANDINS.items():
        (units / name).write_text(f"[Unit]\n{order}[Service]\nType=oneshot\nExecStart={shutil.which('true')}\n")
    more = {"shutdown": EARLY.splitlines()[0], "basic": "Requires=sysinit.target\nAfter=sysinit.target"}
    more |= {"sysinit": "Wants=local-fs.target\nAfter=local-fs.target", "local-fs": EARLY.splitlines()[0]}
    more |= {"multi-user": "Requires=basic.target\nAfter=basic.target"}
    for name in TARGETS:
        (units / f"{name}.target").write_text(f"[Unit]\n{more.get(name, '')}\n")
    (wanted_by,) = re.findall(r"^WantedBy=(.*)$", text, re.MULTILINE)
    for name, target in (WANTED | {FIREWALL: wanted_by}).items():
        (units / f"{target}.wants").mkdir(exist_ok=True)
        (units / f"{target}.wants" / name).symlink_to(units / name)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", "multi-user.target"]
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": str(units), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert FIREWALL not in done.stderr and "cycle" not in done.stderr, done.stderr


# Stands in for systemctl and this one unit: a file says that it is active, whatever becomes of its table.
SYSTEMCTL = """#!/bin/sh
echo "$@" >>{folder}/systemctl.log
case "$1" in
  show) echo Id={unit}; echo LoadState=loaded; [ -e {folder}/active ] && echo ActiveState=active || echo ActiveState=inactive ;;
  is-enabled) echo enabled ;;
  daemon-reload) ;;
  start) [ -e {folder}/active ] || nft -f {folder}/interconnect.nft && touch {folder}/active ;;
  restart) nft delete table inet baremetal_vllm; nft -f {folder}/interconnect.nft && touch {folder}/active ;;
  *) echo "a command that this stand-in does not know: $*" >&2; exit 1 ;;
esac
"""
OWN_NETWORK = ["unshare", "--map-root-user", "--net"]
NFT = "/usr/sbin/nft"
MARK = "b17"
RULES = (
    "table inet baremetal_vllm {\n  chain input {\n    type filter hook input priority -10;\n"
    f'    iifname "lo" accept comment "{MARK}"\n  }}\n}}\n'
)


def own_network() -> bool:
    return Path(NFT).exists() and run([*OWN_NETWORK, NFT, "list", "tables"], ROOT).returncode == 0


@pytest.mark.skipif(not own_network(), reason="there is no nftables, or no network of one's own")
def test_rules_that_somebody_flushed_are_put_back_standin(tmp_path: Path) -> None:
    """The role's tasks in a network of their own, with the kernel's own tables."""
    (tmp_path / "systemctl").write_text(SYSTEMCTL.format(folder=tmp_path, unit=FIREWALL))
    (tmp_path / "systemctl").chmod(0o755)
    me = pwd.getpwuid(os.geteuid()).pw_name
    given = {
        "__vllm_firewall_open": {"manager": "none"},
        "__vllm_firewall_mark": MARK,
        "__vllm_firewall_files": [
            {"path": str(tmp_path / name), "content": text, "mode": "0644", "owner": me}
            for name, text in (("interconnect.nft", RULES), (FIREWALL, unit(tmp_path)))
        ],
    }
    role = {"name": "baremetal.vllm.vllm", "tasks_from": "multi_host_firewall"}
    tasks = [{"ansible.builtin.include_role": role, "vars": given}]
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    playbook = f"ansible-playbook -i localhost, {tmp_path}/play.yml"
    there = f"{NFT} list table inet baremetal_vllm >/dev/null 2>&1; echo there=$?"
    script = [playbook, there, f"{NFT} flush ruleset", f"{playbook} --check", there, playbook, there, playbook, there]
    former = RULES.replace(MARK, "a run ended before it applied the rules")
    (tmp_path / "former.nft").write_text(former)
    script += [f"{NFT} flush ruleset", f"{NFT} -f {tmp_path}/former.nft", playbook, there, playbook, there]
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    settings = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_PYTHON_INTERPRETER": sys.executable, "PATH": path}
    output = run([*OWN_NETWORK, "sh", "-c", "\n".join(script)], ROOT, **settings).stdout
    changed = re.findall(r"changed=(\d+) .*failed=0", output)
    gone = re.findall(r"^there=(\d)", output, re.MULTILINE)
    # The first run, a look in check mode after the flush, the run that mends it, and one more. Then with the former rules in force.
    expected = [("2", "0"), ("1", "1"), ("1", "0"), ("0", "0"), ("1", "0"), ("0", "0")]
    assert list(zip(changed, gone, strict=True)) == expected, output

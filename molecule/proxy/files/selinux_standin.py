#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for getenforce, getsebool, setsebool and semanage of EL 8 and 9, by the name under which it is called.

Takes what these take in the forms that are used here, and refuses everything else, as they do. Its state is in selinux.json beside it;
`calls` there holds what has changed anything. It proves nothing about SELinux: nothing is kept from any port.
"""

import json
import sys
from pathlib import Path

NAME, ARGS = Path(sys.argv[0]).name, sys.argv[1:]
STATE = Path(sys.argv[0]).resolve().parent / "selinux.json"
START = {
    "mode": "Enforcing",
    "booleans": {"httpd_can_network_connect": False},
    "local": {},
    "calls": [],
}
# Of selinux-policy-targeted, as `semanage port -l -n` shows them.
POLICY = {
    "ephemeral_port_t": ["32768-60999"],
    "hi_reserved_port_t": ["512-1023"],
    "http_cache_port_t": ["8080", "8118", "8123", "10001-10010"],
    "http_port_t": ["80", "81", "443", "488", "8008", "8009", "8443", "9000"],
    "jboss_management_port_t": ["4447", "4712", "7600", "9123", "9990", "9999", "18001"],
    "postgresql_port_t": ["5432", "9898"],
    "reserved_port_t": ["1-511"],
    "unreserved_port_t": ["1024-32767", "61000-65535"],
    "vnc_port_t": ["5985-5999", "5900-5983"],
}
state = json.loads(STATE.read_text()) if STATE.exists() else START


def end(code, text="", changed=False):
    if changed:
        state["calls"].append([NAME, *ARGS])
        STATE.write_text(json.dumps(state))
    print(text, file=sys.stderr if code else sys.stdout)
    sys.exit(code)


def rows(local):
    """Lines of `semanage port -l -n`."""
    found = {kind: list(ports) for kind, ports in ({} if local else POLICY).items()}
    for port, kind in state["local"].items():
        found.setdefault(kind, []).insert(0, port)
    lines = [f"{kind:30} tcp      {', '.join(ports)}" for kind, ports in sorted(found.items())]
    return "\n".join([*lines, "" if local else "http_cache_port_t              udp      3130"])


if NAME == "getenforce":
    end(*((1, "usage: getenforce") if ARGS else (0, state["mode"])))
if NAME == "getsebool":
    if state["mode"] == "Disabled":
        end(1, "getsebool:  SELinux is disabled")
    if len(ARGS) != 1 or ARGS[0].startswith("-"):
        end(1, "usage:  getsebool -a or getsebool boolean...")
    if ARGS[0] not in state["booleans"]:
        end(255, "Error getting active value for " + ARGS[0])
    end(0, f"{ARGS[0]} --> {'on' if state['booleans'][ARGS[0]] else 'off'}")
if state["mode"] == "Disabled":
    end(1, NAME + ": SELinux policy is not managed or store cannot be accessed.")
if NAME == "setsebool":
    if len(ARGS) != 3 or ARGS[0] != "-P" or ARGS[2] not in ("on", "off"):
        end(1, "Usage:  setsebool [ -NPV ] boolean value | bool1=val1 bool2=val2...")
    if ARGS[1] not in state["booleans"]:
        end(255, f"Boolean {ARGS[1]} is not defined")
    state["booleans"][ARGS[1]] = ARGS[2] == "on"
    end(0, changed=True)
if NAME == "semanage" and ARGS[:1] == ["port"]:
    if ARGS[1:] in (["-l", "-n"], ["-l", "-n", "-C"]):
        end(0, rows("-C" in ARGS))
    if ARGS[1:2] in (["-a"], ["-m"]) and ARGS[2:3] == ["-t"] and ARGS[4:6] == ["-p", "tcp"] and len(ARGS) == 7:
        kind, port = ARGS[3], ARGS[6]
        if kind not in POLICY:
            end(1, f"ValueError: Type {kind} is invalid, must be a port type")
        known = port in state["local"] or any(port in ports for ports in POLICY.values())
        if known != (ARGS[1] == "-m"):
            end(1, f"ValueError: Port tcp/{port} {'already' if known else 'is not'} defined")
        state["local"][port] = kind
        end(0, changed=True)
    if ARGS[1:4] == ["-d", "-p", "tcp"] and len(ARGS) == 5:
        if ARGS[4] not in state["local"]:
            known = any(ARGS[4] in ports for ports in POLICY.values())
            why = "defined in policy, cannot be deleted" if known else "not defined"
            end(1, f"ValueError: Port tcp/{ARGS[4]} is {why}")
        del state["local"][ARGS[4]]
        end(0, changed=True)
end(2, f"usage: {NAME}: error: unrecognized arguments: {' '.join(ARGS)}")

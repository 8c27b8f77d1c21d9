#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: preflight_probe
short_description: Whether a host could be changed, looked at from the host itself
version_added: 0.1.0
description:
  - Whether package sources and other addresses answer, whether the headers of its kernels are there or to be had, how far its
    clock is off, and what is free on its disks. Never changes anything, package lists included.
options:
  kernels:
    description: Releases of kernels whose headers are looked for.
    type: list
    elements: str
    default: []
  sources:
    description: Whether the package sources that the host has enabled are tried.
    type: bool
    default: true
  urls:
    description: Further addresses to try. Any answer but a server's error counts.
    type: list
    elements: str
    default: []
  proxies:
    description:
      - Proxies, C(http) and C(https), and C(no_proxy). For package sources, a proxy in the package manager's own settings goes before
        them, as it does where packages are installed with these in the environment.
    type: dict
    default: {}
  paths:
    description: Folders whose file system is measured. A missing one is measured where it would be made.
    type: list
    elements: path
    default: []
  reference_time:
    description: What the controller's clock says now, in seconds since the epoch.
    type: float
  timeout:
    description: Seconds to wait for one address.
    type: int
    default: 10
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
"""

EXAMPLES = r"""
- name: Look before leaping
  baremetal.vllm.preflight_probe:
    kernels: ["{{ ansible_facts['gpu'].kernel.running }}"]
    reference_time: "{{ now().timestamp() }}"
  register: probe
"""

RETURN = r"""
addresses:
  description: What was tried, with C(url), C(of) (whose it is) and C(reason), which is empty where it answers.
  returned: success
  type: list
  elements: dict
  sample: [{"url": "http://deb.debian.org/debian/", "of": "apt", "reason": ""}]
clock_offset_s:
  description: Seconds that the host's clock is ahead of O(reference_time); none without one.
  returned: success
  type: float
free_mib:
  description: MiB that are free for this user below each path.
  returned: success
  type: dict
headers:
  description:
    - For each of O(kernels) the C(package), its C(state) and, for V(gone) and V(unknown), why (C(detail)). V(present), V(available),
      V(missing) (no source has it), V(gone) (the lists name it, and the mirror no longer has it) or V(unknown).
  returned: success
  type: dict
"""

import configparser
import glob
import os
import re
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from ansible.module_utils.basic import AnsibleModule

PROXY_REFUSES = 407
NO = ("0", "false", "no", "off")
# What a source says about its server's certificate and the host's own; dnf.conf may say it for all.
TLS = ("sslverify", "sslcacert", "sslclientcert")
DNF_LISTS = ("/var/cache/dnf/*/repodata/repomd.xml", "/var/cache/libdnf5/*/repodata/repomd.xml")


def cause(error):
    """What an error of urllib is about. One of TLS comes by itself once the handshake is over, and its reason is a word."""
    return error if isinstance(error, ssl.SSLError) else getattr(error, "reason", error)


def why_not(error):
    """The cause of a failed connection in words that tell what to look at."""
    reason = cause(error)
    if isinstance(reason, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(reason, (socket.timeout, TimeoutError)):
        return "no answer"
    if isinstance(reason, ssl.SSLError):
        return "TLS: %s" % (getattr(reason, "verify_message", "") or getattr(reason, "reason", "") or reason)
    return "%s" % (getattr(reason, "strerror", "") or reason)


def context_of(tls):
    """How dnf judges a server, by the settings of its source."""
    if tls.get("sslverify", "").lower() in NO:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    authorities = tls.get("sslcacert")
    if not authorities:
        return ssl.create_default_context()
    try:
        context = ssl.create_default_context(**{"capath" if os.path.isdir(authorities) else "cafile": authorities})
    except (IOError, OSError) as error:
        raise ValueError("its sslcacert %s cannot be used: %s" % (authorities, why_not(error)))
    # Python 3.13 and newer ask for extensions that authorities of one's own often lack, and dnf's curl does not.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def wants_certificate(error, tls):
    """Whether a server has ended a connection for want of the host's certificate, which only dnf shows: it was reached."""
    reason = cause(error)
    return bool(tls.get("sslclientcert")) and isinstance(reason, ssl.SSLError) and "alert" in ("%s" % reason).lower()


def ask(url, proxies, timeout, tls=None):
    """(HTTP status or 0, why there is no answer)."""
    tls = tls or {}
    try:
        opener = build_opener(ProxyHandler(proxies), HTTPSHandler(context=context_of(tls)))
        with opener.open(Request(url, method="HEAD"), timeout=timeout) as answer:
            return answer.status, ""
    except HTTPError as error:
        return error.code, ""
    except (URLError, OSError, ValueError) as error:
        return 0, "" if wants_certificate(error, tls) else why_not(error)


def judge(url, proxies, timeout, tls):
    """Why this address is of no use, empty where it answers."""
    status, reason = ask(url, proxies_for(url, proxies), timeout, tls)
    if status == PROXY_REFUSES:
        return "the proxy wants another login"
    return "the server fails with HTTP %d" % status if status >= 500 else reason


def proxies_for(url, proxies):
    host = urlsplit(url).hostname or ""
    for name in (proxies.get("no_proxy") or "").split(","):
        name = name.strip().lstrip(".")
        if name and (host == name or host.endswith("." + name)):
            return {}
    return dict((scheme, proxies[scheme]) for scheme in ("http", "https") if proxies.get(scheme))


def run(module, command):
    """(exit status, output); a program that is missing fails."""
    path = module.get_bin_path(command[0])
    if not path:
        return 127, ""
    status, output, error = module.run_command([path] + command[1:], environ_update={"LC_ALL": "C"})
    return status, output + error


def apt_sources(module):
    """({url: settings of TLS}, proxies) of what apt has enabled; local ones need no network."""
    dummy, text = run(module, ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
    dummy, settings = run(module, ["apt-config", "dump"])
    proxies = dict(re.findall(r'^Acquire::(https?)::[Pp]roxy "([^"]+)";', settings, re.M))
    return dict((line, {}) for line in text.splitlines() if re.match(r"https?://", line)), proxies


def dnf_sources(folder="/etc/yum.repos.d", settings="/etc/dnf/dnf.conf"):
    """({url: settings of TLS}, proxies) of the repositories that dnf has enabled, cut to the server: their paths hold dnf's variables.

    A server whose name a plugin of dnf completes is not among them, as https://rhui.REGION.aws.ce.redhat.com/ of RHEL at AWS.
    """
    main = dict(re.findall(r"^(proxy|ssl\w+)[ \t]*=[ \t]*(\S+)", read(settings), re.M))
    found, proxies = {}, {}
    for path in sorted(glob.glob(os.path.join(folder, "*.repo"))):
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read(path)
        except configparser.Error:
            continue
        for section in parser.sections():
            row = parser[section]
            if row.get("enabled", "1").strip().lower() in NO:
                continue
            tls = dict((name, row.get(name, main.get(name, "")).strip()) for name in TLS)
            for field in ("baseurl", "mirrorlist", "metalink"):
                for url in re.findall(r"https?://[^/\s$,]+/", row.get(field, "")):
                    if not re.search(r"[./][A-Z]+[.]", url):
                        found.setdefault(url, tls)
    if main.get("proxy"):
        proxies = {"http": main["proxy"], "https": main["proxy"]}
    return found, proxies


def read(path):
    try:
        with open(path) as handle:
            return handle.read()
    except (IOError, OSError):
        return ""


def apt_headers(module, package, proxies, timeout):
    if not glob.glob("/var/lib/apt/lists/*Packages*"):
        return "unknown", "the host has no package lists yet"
    status, text = run(module, ["apt-get", "-qq", "download", "--print-uris", package])
    found = re.search(r"^'(\S+)'", text, re.M)
    if status != 0 or not found:
        return "missing", ""
    answer, reason = ask(found.group(1), proxies_for(found.group(1), proxies), timeout)
    if answer == 404:
        return "gone", found.group(1)
    return ("available", "") if answer == 200 else ("unknown", reason or "HTTP %d" % answer)


def dnf_headers(module, package):
    # From the cache: fetching lists would be a change. Without one dnf ends well and finds nothing.
    status, text = run(module, ["dnf", "-q", "-C", "repoquery", package])
    if status != 0 or not any(glob.glob(path) for path in DNF_LISTS):
        return "unknown", "the host has no package lists yet"
    # It prints the package with its epoch: kernel-devel-0:5.14.0-503.el9.x86_64.
    return ("available", "") if re.search(r"^kernel-devel-\d+:", text, re.M) else ("missing", "")


def headers(module, kernel, apt, proxies, timeout):
    package = ("linux-headers-%s" if apt else "kernel-devel-%s") % kernel
    row = {"package": package, "state": "present", "detail": ""}
    if not os.path.exists("/lib/modules/%s/build/Makefile" % kernel):
        row["state"], row["detail"] = (
            apt_headers(module, package, proxies, timeout) if apt else dnf_headers(module, package)
        )
    return row


def free_mib(path):
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize // (1 << 20)


def main():
    module = AnsibleModule(
        argument_spec={
            "kernels": {"type": "list", "elements": "str", "default": []},
            "sources": {"type": "bool", "default": True},
            "urls": {"type": "list", "elements": "str", "default": []},
            "proxies": {"type": "dict", "default": {}},
            "paths": {"type": "list", "elements": "path", "default": []},
            "reference_time": {"type": "float"},
            "timeout": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    params = module.params
    offset = None
    if params["reference_time"] is not None:
        offset = round(time.time() - params["reference_time"], 1)
    apt = bool(module.get_bin_path("apt-get"))
    urls, proxies = {}, {}
    if params["sources"] or params["kernels"]:
        urls, own = apt_sources(module) if apt else dnf_sources()
        # As both package managers do: they take what their settings leave open, and no_proxy, from the environment.
        proxies = dict(params["proxies"], **own)
    tried = [(url, "apt" if apt else "dnf", proxies, urls[url]) for url in sorted(urls) if params["sources"]]
    tried += [(url, "", params["proxies"], {}) for url in params["urls"]]
    with ThreadPoolExecutor(max_workers=8) as pool:
        reasons = list(pool.map(lambda row: judge(row[0], row[2], params["timeout"], row[3]), tried))
    module.exit_json(
        changed=False,
        addresses=[{"url": row[0], "of": row[1], "reason": reason} for row, reason in zip(tried, reasons)],
        clock_offset_s=offset,
        free_mib=dict((path, free_mib(path)) for path in params["paths"]),
        headers=dict(
            (kernel, headers(module, kernel, apt, proxies, params["timeout"])) for kernel in params["kernels"]
        ),
    )


if __name__ == "__main__":
    main()

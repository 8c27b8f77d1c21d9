#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: interconnect_probe
short_description: Look at a host's network interfaces, and measure the way to other hosts
version_added: 0.1.0
description:
  - V(look) reads interfaces, addresses and MTU. V(serve) answers measurements for a while, in the background. V(measure)
    asks hosts that serve, each with a time limit, so that a way that is blocked is found in seconds and named.
  - Sends nothing but what it makes up, and changes nothing.
options:
  action:
    description: What to do.
    type: str
    choices: [look, serve, measure]
    required: true
  token:
    description:
      - Random text of this run, the same on all hosts. Only those that know it are answered.
      - Needed for V(serve) and V(measure).
    type: str
  name:
    description: Name of this host, for V(serve).
    type: str
  addresses:
    description: Addresses of this host to serve on.
    type: list
    elements: str
    default: []
  ports:
    description:
      - Lowest and highest port to serve on, such as those that a firewall lets through. The highest one that is free is taken.
      - Empty takes any.
    type: list
    elements: int
    default: []
  seconds:
    description: How long to serve.
    type: int
    default: 120
  peers:
    description:
      - Hosts to measure the way to, each with C(name), C(address), C(port), C(source) (this host's address), C(mtu) (of its
        interface; a packet of that size must arrive whole) and whether to measure C(bandwidth).
    type: list
    elements: dict
    default: []
  timeout:
    description: Seconds for one step of one measurement.
    type: int
    default: 5
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Runs the same in check mode, as it changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: Answer measurements for two minutes
  baremetal.vllm.interconnect_probe:
    action: serve
    name: "{{ inventory_hostname }}"
    addresses: [10.0.0.1]
    token: "{{ run_token }}"
  register: server

- name: Measure the way to another host
  baremetal.vllm.interconnect_probe:
    action: measure
    token: "{{ run_token }}"
    peers:
      - name: gpu2
        address: 10.0.0.2
        port: "{{ hostvars['gpu2'].server.ports['10.0.0.2'] }}"
        source: 10.0.0.1
        mtu: 9000
        bandwidth: true
"""

RETURN = r"""
interfaces:
  description:
    - For V(look), each interface that is up and not the loopback, with C(name), C(addresses) (C(address) and C(prefix), IPv4
      before IPv6), C(mtu), C(speed_mbps) (none where the driver does not say), C(physical) and C(default) (the default route).
  returned: action is look
  type: list
  elements: dict
ephemeral:
  description: For V(look), the ports that programs get which ask for none, C(net.ipv4.ip_local_port_range), such as V(32768-60999).
  returned: action is look
  type: str
ports:
  description: TCP and UDP port of the server on each address.
  returned: action is serve
  type: dict
time:
  description: This host's clock, seconds since 1970.
  returned: success
  type: float
ways:
  description:
    - For each peer C(name), C(address), C(problem) (empty when all went well), C(rtt_us) (the shortest of several), C(mbps) (one TCP
      stream, none where it was not asked for), C(clock_offset_s) (the peer's clock minus this one's) and C(whole_mtu) (none
      where nothing came back by UDP, which a firewall may close).
  returned: action is measure
  type: list
  elements: dict
"""

import errno
import hashlib
import hmac
import json
import os
import select
import signal
import socket
import struct
import time

from ansible.module_utils.basic import AnsibleModule

NETLINK_ROUTE = 0  # linux/netlink.h
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_DUMP_REQUEST = 0x301
RTM_GETADDR = 22  # linux/rtnetlink.h
IFA_ADDRESS = 1  # linux/if_addr.h
IFA_LOCAL = 2
IP_MTU_DISCOVER = 10  # linux/in.h
IP_PMTUDISC_DO = 2
IPV6_MTU_DISCOVER = 23
IP_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}  # with UDP's
PINGS = 20
BANDWIDTH_S = 1.0
CHUNK = b"\0" * 262144


# ---------------------------------------------------------------------------------------------------------- look


def read(path):
    try:
        with open(path) as handle:
            return handle.read().strip()
    except (IOError, OSError):
        return ""


def ipv4_addresses():
    """Interface -> addresses with their prefixes, by rtnetlink, as `ip` is not everywhere and an ioctl tells one address a name."""
    found = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as sock:
        # struct nlmsghdr, and struct ifaddrmsg of a request for all IPv4 addresses
        request = struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0)
        sock.sendto(struct.pack("=IHHII", 16 + len(request), RTM_GETADDR, NLM_F_DUMP_REQUEST, 1, 0) + request, (0, 0))
        while True:
            data = sock.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", data, 16)[0], "the kernel does not list the addresses")
                if kind == NLMSG_DONE:
                    return found
                address_of(data[16:length], found)
                data = data[padded(length) :]


def address_of(message, found):
    """Adds the address of one struct ifaddrmsg with its attributes."""
    dummy, prefix, dummy, dummy, index = struct.unpack_from("=BBBBI", message)
    place, parts = 8, {}
    while place < len(message):
        length, kind = struct.unpack_from("=HH", message, place)
        parts[kind] = message[place + 4 : place + length]
        place += padded(length)
    # IFA_ADDRESS is the other end's where the interface has two ends; IFA_LOCAL is always this host's.
    address = parts.get(IFA_LOCAL, parts.get(IFA_ADDRESS))
    if address:
        item = {"address": socket.inet_ntoa(address), "prefix": prefix}
        found.setdefault(socket.if_indextoname(index), []).append(item)


def padded(length):
    """Netlink starts everything at a multiple of four bytes."""
    return (length + 3) & ~3


def ipv6_addresses():
    found = {}
    for line in read("/proc/net/if_inet6").splitlines():
        text, dummy, prefix, scope, dummy, name = line.split()
        if scope == "00":  # global
            address = socket.inet_ntop(socket.AF_INET6, bytes(bytearray.fromhex(text)))
            found.setdefault(name, []).append({"address": address, "prefix": int(prefix, 16)})
    return found


def ephemeral_ports():
    return "-".join(read("/proc/sys/net/ipv4/ip_local_port_range").split())


def default_interface():
    for line in read("/proc/net/route").splitlines()[1:]:
        cells = line.split()
        if cells[1] == "00000000" and cells[7] == "00000000":
            return cells[0]
    return None


def interfaces():
    v4, v6, default = ipv4_addresses(), ipv6_addresses(), default_interface()
    found = []
    for name in sorted(os.listdir("/sys/class/net")):
        folder = "/sys/class/net/" + name
        flags = int(read(folder + "/flags") or "0", 16)
        if not flags & 1 or flags & 8:  # IFF_UP, IFF_LOOPBACK
            continue
        try:
            speed = int(read(folder + "/speed") or -1)
        except ValueError:
            speed = -1
        found.append(
            {
                "name": name,
                "addresses": v4.get(name, []) + v6.get(name, []),
                "mtu": int(read(folder + "/mtu") or 0),
                "speed_mbps": speed if speed > 0 else None,
                "physical": os.path.exists(folder + "/device"),
                "default": name == default,
            }
        )
    return found


# --------------------------------------------------------------------------------------------------------- serve


def proof(token, text):
    return hmac.new(token.encode("utf-8"), text.encode("utf-8"), hashlib.sha256).hexdigest()


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def bind(address, ports):
    """A TCP and a UDP socket on one port of an address."""
    for port in range(ports[1], ports[0] - 1, -1) if ports else [0] * 20:
        tcp = socket.socket(family(address), socket.SOCK_STREAM)
        udp = socket.socket(family(address), socket.SOCK_DGRAM)
        try:
            tcp.bind((address, port))
            udp.bind((address, tcp.getsockname()[1]))
        except (IOError, OSError) as error:
            tcp.close()
            udp.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        tcp.listen(64)
        return tcp, udp
    raise OSError(errno.EADDRINUSE, "no port is free for TCP and UDP")


def receive_line(connection):
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1)
        if not part or len(line) > 4096:
            raise OSError(errno.ECONNRESET, "the connection was closed")
        line += part
    return line.decode("utf-8").strip()


def send_line(connection, **message):
    connection.sendall((json.dumps(message) + "\n").encode("utf-8"))


def answer(connection, name, token):
    connection.settimeout(15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    hello = json.loads(receive_line(connection))
    if not hmac.compare_digest(str(hello.get("proof")), proof(token, "ask " + str(hello.get("nonce")))):
        return
    send_line(connection, name=name, proof=proof(token, "answer " + hello["nonce"]))
    while True:
        message = json.loads(receive_line(connection))
        if message["do"] == "ping":
            send_line(connection, time=time.time())
        elif message["do"] == "flood":
            received, start = 0, time.time()
            while True:
                part = connection.recv(1 << 18)
                if not part:
                    return
                received += len(part)
                if part.endswith(b"\1"):
                    send_line(connection, bytes=received, seconds=time.time() - start)
                    break
        else:
            return


def serve(sockets, name, token, seconds):
    """Answers until the time is over, each connection in a process of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    end = time.time() + seconds
    mark = proof(token, "datagram").encode("ascii")
    while time.time() < end:
        for sock in select.select(sockets, [], [], max(0.0, min(1.0, end - time.time())))[0]:
            if sock.type == socket.SOCK_DGRAM:
                data, place = sock.recvfrom(65536)
                if data.startswith(mark):
                    sock.sendto(mark + b"%d" % len(data), place)
                continue
            connection = sock.accept()[0]
            if os.fork() == 0:
                try:
                    answer(connection, name, token)
                except (IOError, OSError, ValueError, KeyError):
                    pass
                os._exit(0)
            connection.close()


def serve_in_background(params):
    """Address -> port of a server that lives on when the module has ended."""
    sockets, ports = [], {}
    for address in sorted(set(params["addresses"])):
        try:
            pair = bind(address, params["ports"])
        except (IOError, OSError) as error:
            raise ValueError("cannot listen on %s: %s" % (address, explain(error)))
        sockets += pair
        ports[address] = pair[0].getsockname()[1]
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        os.chdir("/")
        try:
            serve(sockets, params["name"], params["token"], params["seconds"])
        finally:
            os._exit(0)
    return ports


# ------------------------------------------------------------------------------------------------------- measure


def explain(error):
    if isinstance(error, socket.timeout):
        return "no answer within the time limit: a firewall or a wrong route drops it"
    return getattr(error, "strerror", None) or str(error)


def whole(udp, address, port, token, size):
    """Whether a packet of this size arrives whole and unfragmented; None where none of any size does, as UDP is closed."""
    mark = proof(token, "datagram").encode("ascii")
    if udp.family == socket.AF_INET:
        udp.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    else:
        udp.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IP_PMTUDISC_DO)
    udp.settimeout(0.7)
    for length in (size - IP_HEADERS[udp.family], len(mark)):
        for _number in range(3):
            try:
                udp.sendto(mark + b"\0" * (length - len(mark)), (address, port))
                if udp.recvfrom(4096)[0] == mark + b"%d" % length:
                    return length > len(mark)
            except (IOError, OSError) as error:
                if getattr(error, "errno", None) == errno.EMSGSIZE:
                    return False
    return None


def way(peer, params):
    """One measurement."""
    address, port = peer["address"], int(peer["port"])
    result = {
        "name": peer["name"], "address": address, "problem": "", "rtt_us": None, "mbps": None, "clock_offset_s": None,
        "whole_mtu": None,
    }  # fmt: skip
    try:
        connection = socket.socket(family(address), socket.SOCK_STREAM)
        connection.settimeout(params["timeout"])
        connection.bind((peer["source"], 0))
        connection.connect((address, port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = hashlib.sha256(os.urandom(16)).hexdigest()
        send_line(connection, nonce=nonce, proof=proof(params["token"], "ask " + nonce))
        hello = json.loads(receive_line(connection))
        if not hmac.compare_digest(str(hello.get("proof")), proof(params["token"], "answer " + nonce)):
            raise OSError(errno.EPROTO, "something else answers there")
        if hello["name"] != peer["name"]:
            raise OSError(errno.EPROTO, "%s answers there: two hosts have this address" % hello["name"])
        pings = []
        for _number in range(PINGS):
            sent = time.time()
            send_line(connection, do="ping")
            there = json.loads(receive_line(connection))["time"]
            back = time.time()
            pings.append((back - sent, there - (sent + back) / 2))
        best = min(pings)
        result["rtt_us"] = int(best[0] * 1e6)  # the network's own: the others waited for a processor
        result["clock_offset_s"] = round(best[1], 3)
        if peer.get("bandwidth"):
            send_line(connection, do="flood")
            end = time.time() + BANDWIDTH_S
            while time.time() < end:
                connection.sendall(CHUNK)
            connection.sendall(b"\1")
            told = json.loads(receive_line(connection))
            result["mbps"] = int(told["bytes"] * 8 / told["seconds"] / 1e6)
        send_line(connection, do="end")
        connection.close()
        with socket.socket(family(address), socket.SOCK_DGRAM) as udp:
            udp.bind((peer["source"], 0))
            result["whole_mtu"] = whole(udp, address, port, params["token"], min(int(peer["mtu"]), 65535))
    except (IOError, OSError, ValueError, KeyError) as error:
        result["problem"] = explain(error)
    return result


def main():
    module = AnsibleModule(
        argument_spec={
            "action": {"type": "str", "choices": ["look", "serve", "measure"], "required": True},
            "token": {"type": "str", "no_log": True},
            "name": {"type": "str"},
            "addresses": {"type": "list", "elements": "str", "default": []},
            "ports": {"type": "list", "elements": "int", "default": []},
            "seconds": {"type": "int", "default": 120},
            "peers": {"type": "list", "elements": "dict", "default": []},
            "timeout": {"type": "int", "default": 5},
        },
        required_if=[("action", "serve", ["token", "name", "addresses"]), ("action", "measure", ["token"])],
        supports_check_mode=True,
    )
    params = module.params
    if params["action"] == "look":
        module.exit_json(changed=False, interfaces=interfaces(), ephemeral=ephemeral_ports(), time=time.time())
    if params["action"] == "serve":
        try:
            ports = serve_in_background(params)
        except ValueError as error:
            module.fail_json(msg=str(error))
        module.exit_json(changed=False, ports=ports, time=time.time())
    module.exit_json(changed=False, ways=[way(peer, params) for peer in params["peers"]], time=time.time())


if __name__ == "__main__":
    main()

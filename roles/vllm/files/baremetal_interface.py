# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells the name of the interface that has an address. A boot may name interfaces anew, as after another kernel or driver.

``baremetal_interface.py ADDRESS NAME`` prints NAME when no interface has the address.
"""

import array
import fcntl
import socket
import struct
import sys

SIOCGIFCONF = 0x8912  # linux/sockios.h: all IPv4 addresses with their interfaces
SIZE = 40  # struct ifreq on 64 bits: a name of 16, then a sockaddr whose address is at 4


def addresses():
    """Pairs of (packed address, interface)."""
    buffer = array.array("B", b"\0" * SIZE * 1024)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        answer = fcntl.ioctl(query, SIOCGIFCONF, struct.pack("iL", len(buffer), buffer.buffer_info()[0]))
    data = buffer.tobytes()
    for at in range(0, struct.unpack("iL", answer)[0], SIZE):
        # Further addresses may have a label, such as eth0:1.
        yield data[at + 20 : at + 24], data[at : at + 16].split(b"\0")[0].decode().split(":")[0]
    try:
        with open("/proc/net/if_inet6") as lines:
            for line in lines:
                fields = line.split()
                yield bytes.fromhex(fields[0]), fields[5]
    except OSError:  # IPv6 is off
        pass


def interface(address, otherwise):
    try:
        wanted = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except OSError:  # a name
        return otherwise
    return dict(reversed(list(addresses()))).get(wanted, otherwise)


if __name__ == "__main__":
    print(interface(*sys.argv[1:3]))

# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts vLLM's API server so that its successor can listen on the same port while this one still serves.

vLLM claims its port for itself. With SO_REUSEPORT on both, the kernel gives new connections to whichever server
listens; it asks that both run as the same user.
"""

import runpy
import socket
import sys

SERVER = "vllm.entrypoints.openai.api_server"


def share(port):
    """Makes every TCP socket that is bound to the port shareable."""
    bind = socket.socket.bind

    def shared(self, address):
        if self.type == socket.SOCK_STREAM and isinstance(address, tuple) and address[1] == port:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return bind(self, address)

    socket.socket.bind = shared


# Not in the engine's processes: they import this file under another name.
if __name__ == "__main__":
    share(int(sys.argv[sys.argv.index("--port") + 1]))
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)

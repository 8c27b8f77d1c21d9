# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts vLLM's API server so that its successor can listen on the same port while this one still serves.

vLLM claims its port for itself. With SO_REUSEPORT on both, the kernel gives new connections to whichever server
listens; it asks that both run as the same user.

Replicas (--data-parallel-size) are started by `vllm serve`, which gives each an API server: behind the single one of
the module, four replicas of a 7B on H200 were no faster at 1024 clients than one engine over the same four GPUs. So is
what asks for a number of API servers, which the module overlooks.
"""

import runpy
import socket
import sys

SERVER = "vllm.entrypoints.openai.api_server"
PROGRAM = "baremetal_vllm_main"
OF_PROGRAM = {"--data-parallel-size", "--api-server-count", "-asc"}


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
    module = SERVER
    if OF_PROGRAM.intersection(argument.partition("=")[0] for argument in sys.argv):
        model = sys.argv.index("--model")
        sys.argv[1:] = ["serve", sys.argv[model + 1], *sys.argv[1:model], *sys.argv[model + 2 :]]
        module = PROGRAM
    runpy.run_module(module, run_name="__main__", alter_sys=True)

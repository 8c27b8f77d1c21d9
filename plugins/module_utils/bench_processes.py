# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes that run while a benchmark does: its clients, and a look at the GPUs. For the host's own Python."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading

# A client prints it when it has loaded everything and waits for a line on its standard input, which then stays open: a client
# whose input has ended ends itself.
READY = "BAREMETAL_BENCH_READY"


class Utilization:
    """Samples how busy the GPUs are, once a second, while a block runs."""

    def __init__(self, gpus):
        self.gpus, self.percent, self.process = gpus, None, None

    def __enter__(self):
        program = shutil.which("nvidia-smi")
        if program:
            query = [program, "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "--loop=1"]
            self.output = tempfile.TemporaryFile()
            self.process = subprocess.Popen(query, stdout=self.output, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *error):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.output.seek(0)
            lines = self.output.read().decode("ascii", "replace").splitlines()
            self.output.close()
            read = [match.groups() for match in (re.match(r"\s*(\d+),\s*(\d+)\s*$", line) for line in lines) if match]
            busy = [int(percent) for index, percent in read if not self.gpus or int(index) in self.gpus]
            self.percent = round(sum(busy) / float(len(busy)), 1) if busy else None


class Client(threading.Thread):
    """One process of the benchmark, and what it printed."""

    def __init__(self, command, environment):
        threading.Thread.__init__(self)
        self.daemon, self.lines, self.ready = True, [], threading.Event()
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=environment["HOME"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self):
        for line in self.process.stdout:
            self.lines.append(line.decode("utf-8", "replace").rstrip())
            if self.lines[-1].strip() == READY:
                self.ready.set()
        self.process.wait()
        self.ready.set()

    def begin(self):
        try:
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
        except (IOError, OSError):  # it has ended; its output says why
            pass

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.stdin.close()
        except (IOError, OSError):
            pass

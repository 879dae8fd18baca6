"""An S3 server on this machine for tests: moto's, in a process of its own, which ends with the test's.

Object stores are used in forked ranks only: the threads of the library that speaks to them do not outlive a fork, so
the test process itself must never speak to one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

PROGRAM = """
import logging, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
BUCKET = "runs"
KEY_ID, SECRET = "AKIDOFTHETEST", "secretofthetest"


class S3:
    """A running server; `env` is what a client needs to know."""

    def __init__(self, port: int, process: int) -> None:
        self.process = process
        self.address = f"http://127.0.0.1:{port}"
        self.env = {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ENDPOINT": self.address,
        }

    def ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        """One request by hand, for what the product never does; also a second opinion on what it did."""
        request = urllib.request.Request(
            f"{self.address}/{path}", method=method, data=data, headers={"Content-Type": "text/plain"}
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            return answer.read()

    def permit(self, yes: bool) -> None:
        """From now on every request is allowed, or refused with 403."""
        self.ask("POST", "moto-api/reset-auth", b"inf" if yes else b"0")

    def stand(self, still: bool) -> None:
        """From now on no request is answered, or all are again."""
        os.kill(self.process, signal.SIGSTOP if still else signal.SIGCONT)

    def unfinished(self) -> int:
        """Uploads that were begun and neither ended nor given up."""
        return self.ask("GET", f"{BUCKET}?uploads").count(b"<UploadId>")


@contextmanager
def running() -> Iterator[S3]:
    """A server with the empty bucket `BUCKET`."""
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdin is not None and child.stdout is not None
        line = ""
        while not line.strip().isdigit():
            line = child.stdout.readline()
            assert line or child.poll() is None, "the S3 server did not start"
        server = S3(int(line), child.pid)
        server.ask("PUT", BUCKET)
        yield server
    finally:
        child.kill()
        child.communicate()

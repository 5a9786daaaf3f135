"""Asks starting processes whether they are ready, in one thread, and says so in the inbox."""

from __future__ import annotations

import http.client
import queue
import ssl
import threading
from urllib.parse import urlsplit

from baton.controller.spec import Check, HttpCheck
from baton.controller.supervisor import Answered, Event

Inbox = queue.SimpleQueue[Event]
PERIOD = 0.1
TIMEOUT = 1.0


class Prober:
    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._changed = threading.Condition()
        self._open: dict[tuple[str, int], Check] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="prober")
        self._thread.start()

    def add(self, name: str, run: int, check: Check) -> None:
        """Ask until it passes or `drop`."""
        with self._changed:
            self._open[name, run] = check
            self._changed.notify()

    def drop(self, name: str, run: int) -> None:
        """Idempotent."""
        with self._changed:
            self._open.pop((name, run), None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait(PERIOD if self._open else None)
                if self._closed:
                    return
                checks = list(self._open.items())
            for (name, run), check in checks:
                if passes(check):
                    self.drop(name, run)
                    self._inbox.put(Answered(name, run))


def passes(check: Check) -> bool:
    """One try, at most `TIMEOUT` seconds."""
    if not isinstance(check, HttpCheck):
        return check.path.exists()
    url = urlsplit(check.url)
    host = url.hostname or ""
    if url.scheme == "https":  # our own child: whose certificate it is does not matter
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, url.port, timeout=TIMEOUT, context=trusting
        )
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=TIMEOUT)
    try:
        headers = {"Authorization": f"Bearer {check.token}"} if check.token else {}
        connection.request("GET", url.path or "/", headers=headers)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

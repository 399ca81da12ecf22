"""Connections between the processes of a job, so that none waits for one that is dead. Imports no torch.

Each process keeps a connection to the first one, the leader. The kernel closes it when a process dies, however it dies.
After the loss of a machine, TCP's keepalive finds out within KEEPALIVE_S. The leader then tells all others. So a job
ends as a whole within 2 GRACE_S after the loss was found, even if its processes wait for each other on their GPUs.

Messages are JSON objects, one on a line: `hello` to the leader, which answers `welcome`; `failed`, both ways; `done` to
the leader; `end` to the others; and what the leader's caller sends.
"""

import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from exnorm.engine.job import Place
from exnorm.runs.loader_room import allow_files
from exnorm.runs.subprocesses import leave_to_parent

GRACE_S = 10.0  # after a failure, until a process that has not ended by itself is ended
KEEPALIVE_S = 60  # until the loss of a machine is found
HELLO_S = 60  # for the first message of a new connection
LONGEST = 1 << 20  # characters of a message
EXIT_FAILED = 2
FILES_EACH = 3  # open files of the leader for each process: this connection, and those of torch's store and gloo
FILES = 32  # and for all else
Message = dict[str, Any]


class Line:
    """A connection that carries messages."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("r", encoding="utf-8", errors="replace")
        self._sending = threading.Lock()
        _keep_alive(connection)
        leave_to_parent(self)

    def send(self, message: Message) -> None:
        """Send a message. Nothing happens if the other side has gone; reading finds that out."""
        try:
            with self._sending:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> Message | None:
        """Wait for a message; None if the other side has gone."""
        try:
            text = self._reader.readline(LONGEST)
            message = json.loads(text) if text.endswith("\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """End the connection. The socket stays open while its reader is."""
        self._reader.close()
        self._connection.close()

    def close_in_child(self) -> None:
        """Leave the connection to the parent. Otherwise a loader process that outlives it would keep it."""
        if self._connection.fileno() >= 0:
            os.close(self._connection.detach())


class Leader:
    """The connections of the first process of a job to all others."""

    def __init__(self, size: int) -> None:
        self.token = secrets.token_hex(16)  # keeps strangers out
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6)
        self.port: int = self._server.getsockname()[1]
        self.on_loss: Callable[[str], None] = lambda cause: None  # called before a stuck leader is ended
        self._lines: dict[int, Line] = {}
        self._places: dict[int, Place] = {}
        self._size = size
        self._changed = threading.Condition()
        self._left: set[int] = set()  # ranks whose connection has ended
        self._cause: str | None = None
        self._ending = False
        leave_to_parent(self)
        threading.Thread(target=self._accept, daemon=True).start()

    def followers(self, timeout_s: float) -> list[Place]:
        """Return the places of all other processes, once they have come; fewer if the time is over.

        Raises:
            UserError: this process may not open as many files.
        """
        users = f"connections of a job of {self._size} processes"
        allow_files(FILES_EACH * self._size + FILES, users=users, advice="Use")
        with self._changed:
            self._changed.wait_for(lambda: len(self._places) == self._size - 1 or self._cause is not None, timeout_s)
            return [self._places[rank] for rank in sorted(self._places)]

    def send(self, rank: int, message: Message) -> None:
        """Send a message to one process."""
        self._lines[rank].send(message)

    def cause(self, wait_s: float = 0.0) -> str | None:
        """Return why another process failed; None if none has, as far as is known after waiting."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None, wait_s)
            return self._cause

    def end(self, message: Message) -> None:
        """Send a last message to all processes, and wait until they have ended, for at most GRACE_S."""
        with self._changed:
            self._ending = True
        for line in list(self._lines.values()):
            line.send(message)
        with self._changed:
            self._changed.wait_for(lambda: len(self._left) == len(self._lines), GRACE_S)
        self._server.close()

    def close_in_child(self) -> None:
        """Leave the port to the parent."""
        if self._server.fileno() >= 0:
            os.close(self._server.detach())

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Read what one process sends, until it ends."""
        connection.settimeout(HELLO_S)
        line = Line(connection)
        hello = line.receive() or {}
        if hello.get("token") != self.token:
            line.close()
            return
        connection.settimeout(None)
        place = Place(**hello["hello"])
        with self._changed:
            self._lines[place.rank], self._places[place.rank] = line, place
            self._changed.notify_all()
        line.send({"welcome": True})
        last: Message = {}
        while (message := line.receive()) is not None:
            last = message
            if "failed" in message:
                self._fail(f"rank {place.rank} on {place.host}: {message['failed']}")
        with self._changed:
            self._left.add(place.rank)
            self._changed.notify_all()
        if "done" not in last:
            self._fail(f"rank {place.rank} on {place.host} ended without a message. It was killed, or printed why")

    def _fail(self, cause: str) -> None:
        """Note the first failure of a process, tell all others, and see that this process ends, too."""
        with self._changed:
            if self._cause is not None or self._ending:
                return
            self._cause = cause
            self._changed.notify_all()
        for line in list(self._lines.values()):
            line.send({"failed": cause})
        threading.Thread(target=self._end_if_stuck, args=(cause,), daemon=True).start()

    def _end_if_stuck(self, cause: str) -> None:
        time.sleep(2 * GRACE_S)
        if not self._ending:  # else this process has said it, and does not get to its end
            self.on_loss(cause)
            print(f"exnorm: error: {cause}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)


class Follower:
    """The connection of another process of a job to the first one.

    Raises:
        OSError: there is no leader with this token at this address.
    """

    def __init__(self, place: Place, host: str, port: int, token: str) -> None:
        self.token, self._place = token, place
        connection = socket.create_connection((host, port), timeout=HELLO_S)
        self._line = Line(connection)
        self._line.send({"token": token, "hello": asdict(place)})
        if self._line.receive() is None:
            connection.close()
            raise ConnectionError("another program is there")
        connection.settimeout(None)
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._over = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def receive(self) -> Message:
        """Wait for a message of the leader: its own, or `failed` if the job has failed."""
        return self._messages.get()

    def job_has_failed(self, wait_s: float) -> bool:
        """Return whether another process has failed, as far as is known after waiting."""
        return self._over.wait(wait_s)

    def fail(self, text: str) -> None:
        """Tell the leader why this process ends."""
        self._line.send({"failed": text})

    def done(self) -> None:
        """Tell the leader that this process ends as it should."""
        self._line.send({"done": True})

    def _read(self) -> None:
        while (message := self._line.receive()) is not None and "failed" not in message:
            self._messages.put(message)
            if "end" in message:
                time.sleep(GRACE_S)
                os._exit(0)  # what it was asked for is done, but it does not get to its end
        if message is None and self._place.local_rank == 0:
            lost = "rank 0 ended without a message. It was killed, or printed why"
            print(f"exnorm: error: {lost} (seen on {self._place.host})", file=sys.stderr, flush=True)
        self._over.set()
        self._messages.put({"failed": ""})
        time.sleep(GRACE_S)
        os._exit(EXIT_FAILED)


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out within KEEPALIVE_S that the other machine has gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # all systems but macOS
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

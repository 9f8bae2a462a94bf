"""All ranks of a pre-flight meet before any of them has imported torch, which takes minutes on a cold file system: who
has begun, who still imports, who is gone? Standard library alone.

Rank 0 listens on the port that training will use. A rank says when it begins and when it is ready; once all are, it is
told to go on.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

JOIN_S = 600.0  # for all to have begun and to be ready
SAY_S = 15.0  # between lines about who is missing
TRY_S = 5.0  # for one connection
READY, GO = b"ready\n", b"go\n"
Say = Callable[[str, bool], object]


class Missing(RuntimeError):
    """Not all ranks came. Who knows why has said so before it sends the others away: srun then ends them all."""


def meet(
    rank: int, world: int, address: str, port: int, job: str, work: Callable[[], None], where: Callable[[int], str],
    say: Say,
) -> None:  # fmt: skip
    """Do `work` (the imports) and return when all ranks of `job` have done theirs. `where` names a rank and its node.

    Raises Missing where one doesn't come, or is gone, or rank 0 can't open the port. The reason is given to `say`,
    and whether it is one that a stop signal can't explain.
    """
    if rank == 0:
        try:
            host = _Host(world, port, job, where, say)
        except OSError as error:
            say(f"port {port} can't be opened ({error}): see what else listens there", True)
            raise Missing from None
        thread = threading.Thread(target=host.run, name="meeting", daemon=True)
        thread.start()
        work()
        host.ready.add(0)
        thread.join()
        if host.reason:
            raise Missing
        return
    with _connect(address, port, say) as line:
        with suppress(OSError):
            line.sendall(json.dumps({"job": job, "rank": rank}).encode() + b"\n")
        work()
        line.settimeout(JOIN_S + SAY_S)
        with suppress(OSError):  # rank 0 says why
            line.sendall(READY)
            if line.recv(len(GO)) == GO:
                return
    raise Missing


def _connect(address: str, port: int, say: Say) -> socket.socket:
    """Rank 0's task may begin minutes after this one."""
    end, next_line, host = time.monotonic() + JOIN_S, time.monotonic() + SAY_S, socket.gethostname()
    while True:
        try:
            return socket.create_connection((address, port), timeout=TRY_S)
        except OSError as error:
            if time.monotonic() > end:
                say(f"{address}:{port} can't be reached for {JOIN_S:.0f} s ({error}): check firewalls between the "
                    "nodes, and what else listens there", True)  # fmt: skip
                raise Missing from None
            if time.monotonic() > next_line:
                next_line = time.monotonic() + 4 * SAY_S
                print(f"pre-flight: {host} can't reach {address}:{port} yet ({error}): its task may not have begun; a "
                      f"firewall looks the same. Tried for {JOIN_S:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(0.2)


class _Host:
    """Rank 0's side, in a thread of its own: it speaks while torch is imported."""

    def __init__(self, world: int, port: int, job: str, where: Callable[[int], str], say: Say) -> None:
        self.ready: set[int] = set()
        self.reason, self._gone = "", False
        self._world, self._job, self._where, self._say = world, job, where, say
        self._begun: dict[int, float] = {0: time.monotonic()}
        self._lines: dict[socket.socket, int | None] = {}  # connection -> rank
        try:
            self._server = socket.create_server(("", port), family=socket.AF_INET6, backlog=world, dualstack_ipv6=True)
        except (OSError, ValueError):  # a host without IPv6
            self._server = socket.create_server(("", port), backlog=world)

    def run(self) -> None:
        end, next_line = time.monotonic() + JOIN_S, time.monotonic() + SAY_S
        with self._server, selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            while len(self.ready) < self._world and not self.reason:
                for key, _ in selector.select(timeout=0.1):
                    self._accept(selector) if key.fileobj is self._server else self._read(key.fileobj, selector)
                if time.monotonic() < min(next_line, end) or not (missing := self._missing()):
                    continue  # without a missing one rank 0 is just ready
                if time.monotonic() > end:
                    self.reason = (f"after {JOIN_S:.0f} s it still waits for {missing}: look at these nodes, or leave "
                                   "them out (sbatch --exclude)")  # fmt: skip
                else:
                    next_line = time.monotonic() + SAY_S
                    print(f"pre-flight: waiting for {missing}", file=sys.stderr, flush=True)
            if self.reason:  # while all still wait
                self._say(self.reason, not self._gone)
        for line in self._lines:  # the port is free again by now
            with line, suppress(OSError):
                if not self.reason:
                    line.setblocking(True)
                    line.sendall(GO)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with suppress(OSError):
            line, _ = self._server.accept()
            line.setblocking(False)
            self._lines[line] = None
            selector.register(line, selectors.EVENT_READ)

    def _read(self, line: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            said = line.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        for word in said.splitlines(keepends=True):
            if word == READY and self._lines[line] is not None:
                self.ready.add(self._lines[line])
                continue
            with suppress(ValueError, KeyError, TypeError):  # a port scanner is no rank
                if (told := json.loads(word))["job"] == self._job and 0 <= told["rank"] < self._world:
                    self._lines[line] = told["rank"]
                    self._begun[told["rank"]] = time.monotonic()
        if not said:
            selector.unregister(line)
            if (rank := self._lines.pop(line)) is not None:
                self._gone = True
                self.reason = f"{self._where(rank)} ended while it imported torch: its own words are above"
            line.close()

    def _missing(self) -> str:
        now = time.monotonic()
        importing = [f"{self._where(rank)}, importing torch for {now - self._begun[rank]:.0f} s"
                     for rank in sorted(self._begun.keys() - self.ready)]  # fmt: skip
        absent = [f"{self._where(rank)}, not begun" for rank in range(self._world) if rank not in self._begun]
        found = importing + absent
        return "; ".join(found[:16]) + (f"; and {len(found) - 16} more" if len(found) > 16 else "")

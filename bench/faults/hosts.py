"""Two hosts with a cable between them: network namespaces of this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from random import Random

ADDRESSES = ("10.78.0.1", "10.78.0.2")


@dataclass(frozen=True)
class Hosts:
    """What to put before a command to run it on the first, and on the second."""

    prefixes: tuple[list[str], list[str]]

    def run(self, host: int, *command: str) -> None:
        subprocess.run([*self.prefixes[host], *command], check=True, timeout=20, capture_output=True)

    def cut(self, random: Random) -> str:
        """Pull the cable at one end, or lose in silence what is sent over it. Says which."""
        end = random.randrange(3)
        if end < 2:
            self.run(end, "ip", "link", "set", "cable", "down")
            return f"cable pulled at {ADDRESSES[end]}"
        self.silence()
        return "cable silent"

    def silence(self) -> None:
        """Lose what is sent over the cable, until `heal`."""
        for host in range(2):
            nowhere = ("lladdr", "02:00:00:00:00:99", "dev", "cable", "nud", "permanent")
            self.run(host, "ip", "neigh", "replace", ADDRESSES[1 - host], *nowhere)

    def slow(self, kbit_per_s: int) -> None:
        """Let no more through the cable, until `heal`."""
        for host in range(2):
            limit = ("rate", f"{kbit_per_s}kbit", "burst", "16kbit", "latency", "400ms")
            self.run(host, "tc", "qdisc", "replace", "dev", "cable", "root", "tbf", *limit)

    def heal(self) -> None:
        for host in range(2):
            with suppress(subprocess.CalledProcessError):  # it is not slow
                self.run(host, "tc", "qdisc", "del", "dev", "cable", "root")
            self.run(host, "ip", "neigh", "flush", "all", "nud", "permanent")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises OSError or CalledProcessError where the system gives no namespaces."""
    with ExitStack() as stack:

        def namespace(*command: str) -> int:
            """The id of a process that holds it until the end."""
            holder = [*command, sys.executable, "-c", "print(1, flush=True); input()"]
            process = stack.enter_context(
                subprocess.Popen(
                    holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            )
            stack.callback(process.kill)
            if process.stdout is None or process.stdout.readline() != "1\n":
                raise OSError("there are no network namespaces")
            return process.pid

        def inside(pid: int) -> list[str]:
            return ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]

        first = namespace("unshare", "-rn")
        second = namespace(*inside(first), "unshare", "-n")
        hosts = Hosts((inside(first), inside(second)))
        hosts.run(0, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "other")
        hosts.run(0, "ip", "link", "set", "other", "netns", str(second))
        hosts.run(1, "ip", "link", "set", "other", "name", "cable")
        for host, address in enumerate(ADDRESSES):
            hosts.run(host, "ip", "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                hosts.run(host, "ip", "link", "set", device, "up")
        yield hosts

"""Wait until a Ray cluster has so many nodes: `python wait_for_nodes.py ADDRESS NODES SECONDS`; exit code 1 if not."""

from __future__ import annotations

import logging
import socket
import sys
import time

import ray


def answers(address: str) -> bool:
    """Whether somebody listens there. Asked first: Ray's client would end this process where nobody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def wait_for_nodes(address: str, count: int, seconds: float) -> int:
    """How many nodes are alive, as soon as these are `count` or the time is over."""
    deadline = time.monotonic() + seconds
    while not answers(address):
        if time.monotonic() > deadline:
            return 0
        time.sleep(1)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    while True:
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive >= count or time.monotonic() > deadline:
            return alive
        time.sleep(1)


if __name__ == "__main__":
    wanted, found = int(sys.argv[2]), wait_for_nodes(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    if found < wanted:
        sys.exit(f"{found} of {wanted} Ray nodes came up at {sys.argv[1]} within {sys.argv[3]} s")

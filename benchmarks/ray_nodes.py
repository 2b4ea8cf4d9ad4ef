"""A real Ray cluster of several nodes on this machine, to lose nodes of and to add some: raylets of their own each.

They live in a process of their own, as a cluster does. `python -m benchmarks.ray_nodes` is that process: it prints the
address, starts a node for every line "CPUS" that it reads, prints "RAYLET PORT" (its process id and the port of its
metrics), and ends everything when it can read no more.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
METRICS_EVERY = 500  # milliseconds between two reports of a process to its node's exporter; Ray waits for 10 s


@dataclass(frozen=True)
class Node:
    """One node: the process id of its raylet, and the port at which Prometheus would ask."""

    raylet: int
    metrics_port: int

    def processes(self) -> list[psutil.Process]:
        """Its raylet and all that runs below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(self.raylet)
            return [raylet, *raylet.children(recursive=True)]
        return []

    def runs(self, process: int) -> bool:
        """Whether a process is one of this node's."""
        return process in [each.pid for each in self.processes()]

    def lose(self) -> None:
        """Kill all of it at once, as when a machine loses its power."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class RayNodes:
    """The cluster; `address` is what `--address` takes. Ends with its block, or by `close`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        self.nodes: list[Node] = []
        self.address = self._read()

    def add(self, cpus: int = 1) -> Node:
        """Start another node, and wait until it belongs to the cluster."""
        assert self._process.stdin
        self._process.stdin.write(f"{cpus}\n")
        self._process.stdin.flush()
        raylet, port = map(int, self._read().split())
        self.nodes.append(Node(raylet, port))
        return self.nodes[-1]

    def close(self) -> None:
        """End all nodes."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            for node in self.nodes:
                node.lose()

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line:
            raise OSError("the Ray cluster has ended by itself")
        return line


def main() -> None:
    """Be the cluster."""
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, **common, "_system_config": {"metrics_report_interval_ms": METRICS_EVERY}},
    )
    print(cluster.address, flush=True)
    for line in sys.stdin:
        node = cluster.add_node(num_cpus=int(line), **common)
        raylet = node.all_processes["raylet"][0].process.pid
        print(raylet, node.metrics_export_port, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()

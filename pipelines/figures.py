"""What an evaluation returns: its metrics by name, which print themselves."""

from __future__ import annotations

from typing import Any


class Figures(dict[str, Any]):
    """Metrics by name, as they are written to JSON; `print` shows those that fit into a line each."""

    def __str__(self) -> str:
        baseline = self.get("baseline", {})
        lines = []
        for name, value in self.get("brief", self).items():
            if isinstance(value, (int, float)):
                beside = f"   (query-blind {baseline[name]:.2f})" if name in baseline else ""
                lines.append(f"{name:24s}{value:8.2f}{beside}")
            elif isinstance(value, dict):
                lines.append(f"{name:24s}" + "  ".join(f"{inner} {figure:g}" for inner, figure in value.items()))
        if self.get("dropped"):
            lines.append(f"{self['dropped']} annotated items left out: their videos are not in the shards")
        return "\n".join(lines)

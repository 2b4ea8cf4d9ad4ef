"""`videoclip mcp`: an archive as tools for assistants, by the Model Context Protocol over stdio; extra `mcp`.

Three tools: `find_moment`, `read_transcript`, `get_frame`. Every answer cites the video, the seconds and the line
said, so that whoever reads it can look. The tools read; nothing is written, and no path is taken from a caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from videoclip.errors import InputError


@dataclass(frozen=True)
class MCPConfig:
    """Serve an archive to assistants, over standard input and output; they start this command themselves."""

    model: Path
    """Folder of the model that made the index."""
    index: Path = Path("runs/index")
    """Folder that `videoclip index` wrote."""


def serve_mcp(config: MCPConfig) -> None:
    """Serve until the other side closes.

    Raises InputError if the archive cannot be searched, or the extra is not installed.
    """
    from pipelines.search import open_archive

    try:
        from pipelines.mcp_tools import make_server
    except ImportError:
        raise InputError("the MCP server is not installed; run: pip install 'videoclip[mcp]'") from None
    make_server(open_archive(config.model, config.index)).run("stdio")

"""Templates for labels and captions: "a video of {}" puts a text where the braces are."""

from __future__ import annotations

from collections.abc import Sequence

from videoclip.errors import InputError

PLAIN = ("{}",)


def check_templates(templates: Sequence[str]) -> None:
    """Raises InputError if there is none, or one does not say where the text goes."""
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"the template {template!r} must hold {{}} once, where the text goes")
    if not templates:
        raise InputError("give at least one template; {} is the plain text")

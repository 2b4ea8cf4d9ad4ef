"""Errors that are meant for a person rather than for a programmer."""

from __future__ import annotations


class InputError(ValueError):
    """Something that a person gave us cannot be used: a file, an option, a row of data.

    The message is one line that says what was wrong, where (file, row, id) and what to do.
    The command prints it and exits with code 2; a long run writes it to its quarantine list.
    """

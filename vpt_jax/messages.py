# SPDX-License-Identifier: Apache-2.0
"""Errors in several lines, and the word that was meant."""

import difflib
from collections.abc import Iterable
from typing import Any


def advised(message: str, *lines: str) -> ValueError:
    """An error with lines of advice, such as a command to paste.

    The lines are the error's notes: the command line prints each on a line of its own,
    and Python shows them under a traceback. The message itself stays one line.

    Example:
      >>> raise advised("got no data set; prepare it:", "  make data")
      Traceback (most recent call last):
        ...
      ValueError: got no data set; prepare it:
        make data
    """
    error = ValueError(message)
    for line in lines:
        error.add_note(line)
    return error


def did_you_mean(value: Any, known: Iterable[Any]) -> str:
    """`did you mean 'svhn'? ` for `shvn`; nothing where no known word is near."""
    words = {word.lower(): word for word in known if isinstance(word, str)}
    near = difflib.get_close_matches(str(value)[:200].lower(), words, 1)
    return f"did you mean {words[near[0]]!r}? " if near else ""

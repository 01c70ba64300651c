# SPDX-License-Identifier: Apache-2.0
"""How errors say what is wrong: one line, whatever a file or a value holds.

An error says what was got, what was expected and what to do, in short sentences.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 200  # characters of a wrong value that a message shows
FIRST = 10  # of many names, in a message


def mismatch(where: Any, got: str, expected: str, remedy: str) -> ValueError:
    """The error of something that was read (`where`, if not empty), to be raised.

    Example:
      >>> str(mismatch("a.png", "0 bytes", "a picture", "fetch it again"))
      'a.png: got 0 bytes; expected a picture; fetch it again.'
    """
    start = f"{where}: " if where else ""
    return ValueError(f"{start}got {got}; expected {expected}; {remedy}.")


def expect(right: Any, name: str, value: Any, expected: str) -> None:
    """Raises ValueError with what was got and what was expected, unless it is right."""
    if not right:
        raise ValueError(f"{name} is {shown(value)}; expected {expected}.")


def shown(value: Any, longest: int = LONGEST) -> str:
    """A value as Python writes it in ASCII, and not all of a long one."""
    try:
        text = ascii(value)
    except ValueError:  # integers of thousands of digits have no text
        return "a number of thousands of digits"
    return text if len(text) <= longest else f"{text[:longest]}..."


def first_of(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(texts) - FIRST
    tail = f"; and {more:,} more" if more > 0 else ""
    return "; ".join(text[:LONGEST] for text in texts[:FIRST]) + tail


def printable(text: str) -> str:
    """A name or text from outside, fit for one line of a terminal, a log or a page.

    What cannot be printed (line ends, escape sequences, bytes that are not UTF-8) is
    shown as Python's escapes.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error: BaseException, longest: int = LONGEST) -> str:
    """What an error of another library says, on one line; its type if that is empty."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]}..."


def advised(message: str, *lines: str) -> ValueError:
    """An error with lines of advice, such as a command to paste.

    The lines are notes: the command line prints each on a line of its own.

    Example:
      >>> advised("got no data set; prepare it:", "  make data").__notes__
      ['  make data']
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


def unknown_key(prefix: str, name: str, known: Iterable[Any]) -> str:
    """What to say of a config key that is not there; names the near one, and all."""
    known = list(map(str, known))
    return (
        f"unknown config key {prefix}{name}; {did_you_mean(name, known)}known keys"
        f" there: {', '.join(known)}."
    )

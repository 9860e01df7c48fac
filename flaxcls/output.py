"""Text for people: one guarded way to print it, and names made safe to print.

Telling must never end a training: a pipe whose reader has gone, a terminal that was closed, a log
on a full disk or an encoding that lacks a letter take nothing but the text with them. Where the
text is the result of a command, `write_result` says that it is lost.
"""

import errno
import os
import re
import sys
import unicodedata
from typing import TextIO

from flaxcls.errors import OutputError

# What a terminal or a reader would take for something else than the name of a file or a class:
# control characters, line separators, and marks that turn the direction of what comes after.
_UNSAFE = ("Cc", "Cs", "Zl", "Zp")
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
_ASCII_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")


def printable(name: str | os.PathLike) -> str:
    """The name of a file or a class as one line of text, whatever bytes it is made of.

    What is not UTF-8 or is no visible character is shown as Python writes it: \\xff, \\x1b, \\n.
    """
    try:
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character that no file system gave, but JSON can write
        text = os.fspath(name).encode("utf-8", "backslashreplace").decode()
    if text.isprintable():
        return text
    return "".join(_escaped(c) for c in text)


def _escaped(character: str) -> str:
    unsafe = unicodedata.category(character) in _UNSAFE or character in _BIDIRECTIONAL
    return character.encode("unicode_escape").decode() if unsafe else character


def say(text: str, *, error: bool = False) -> None:
    """Prints lines on standard output, or standard error, if that can be done; never raises."""
    stream = sys.stderr if error else sys.stdout
    try:
        _print(text, stream)
    except (OSError, ValueError, AttributeError):  # gone, full, closed, or there never was one
        _silence(stream)


def write_result(text: str) -> None:
    """Prints lines that a command was started for; OutputError if they can't be."""
    try:
        _print(text, sys.stdout)
    except (OSError, ValueError, AttributeError) as error:
        _silence(sys.stdout)
        raise OutputError(_why_not_written(error)) from error


def _why_not_written(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return "the reader of standard output has gone: not all of the result was written"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is closed"
    return f"standard output can't be written: {reason}"


def _print(text: str, stream: TextIO) -> None:
    text = _ASCII_CONTROL.sub(lambda match: _escaped(match[0]), text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _silence(stream: TextIO | None) -> None:
    """What is still in the buffer would fail once more when Python ends, with a traceback."""
    if stream in (sys.__stdout__, sys.__stderr__) and stream is not None:
        try:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())
        except (OSError, ValueError):
            pass

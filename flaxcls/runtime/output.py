"""Text for people: one guarded way to print it, and names made safe to print.

Printing must never end a run: a pipe whose reader has gone, a terminal that was closed, a log
on a full disk or an encoding that lacks a letter lose nothing but the text. Where the text
is the result of a command, `write_result` says that it is lost.
"""

import atexit
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
_LINES_AND_COLUMNS = re.compile("([\n\t])")
_MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)  # there may be room later
_FAILED = (OSError, ValueError, AttributeError)  # gone or full; closed; there never was one


def printable(name: str | os.PathLike) -> str:
    """The name of a file or a class as one line of text, whatever bytes it is made of.

    What is not UTF-8 or is no visible character is shown as Python writes it: \\xff, \\x1b, \\n.
    """
    try:
        text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character that no file system gave, but JSON can write
        text = os.fspath(name).encode("utf-8", "backslashreplace").decode()
    if text.isprintable():
        return text
    return "".join(_escaped(c) for c in text)


def printable_lines(text: str) -> str:
    """The text, in which lines and columns may be, with all else as `printable` shows it."""
    parts = _LINES_AND_COLUMNS.split(text)
    return "".join(part if part in ("\n", "\t") else printable(part) for part in parts)


def _escaped(character: str) -> str:
    unsafe = unicodedata.category(character) in _UNSAFE or character in _BIDIRECTIONAL
    return character.encode("unicode_escape").decode() if unsafe else character


def say(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Prints lines on standard output, or standard error, if that can be done; never raises."""
    stream = Guarded(error=error)
    stream.write(printable_lines(text) + end)
    stream.flush()


def write_result(text: str) -> None:
    """Prints lines that a command was started for; OutputError if they can't be."""
    stream = Guarded(result=True)
    stream.write(printable_lines(text) + "\n")
    stream.flush()


class Guarded:
    """Standard output or error for libraries that write, such as Rich and csv.

    Writing never raises anything or, where it is the `result` of a command, OutputError. What the
    encoding lacks is escaped.

    Args:
      error: whether it is standard error.
      result: whether it is an error that something could not be written.
      exact: writes the bytes of file names that are not in the stream's encoding as they are.
    """

    def __init__(self, *, error: bool = False, result: bool = False, exact: bool = False):
        self._error, self._result, self._exact = error, result, exact

    @property
    def _stream(self) -> TextIO:
        # Whatever it is now; a live line of Rich on a terminal replaces it for a while.
        return sys.stderr if self._error else sys.stdout

    @property
    def rich_proxied_file(self) -> "Guarded":
        """What Rich itself writes to, below the stream that it has replaced."""
        return _BelowRich(error=self._error, result=self._result)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        if type(self._stream).__module__ == "ipykernel.iostream":
            return False  # a notebook says that it is one, but takes few of its control codes
        try:
            return self._stream.isatty()
        except _FAILED:
            return False

    def write(self, text: str) -> int:
        try:
            self._write(text)
        except _FAILED as error:
            self._failed(error)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            if self._exact and hasattr(self._stream, "buffer"):
                self._stream.flush()
                self._stream.buffer.write(_exact(text, self.encoding))
                return
            text = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._stream.write(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except _FAILED as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if getattr(error, "errno", None) not in _MAY_PASS:
            _silence(self._stream)
        atexit.register(flush)  # or Python says at its end, with an exit code, that it is full
        if self._result:
            raise OutputError(_why_not_written(error)) from error


class _BelowRich(Guarded):
    @property
    def _stream(self) -> TextIO:
        stream = super()._stream
        return getattr(stream, "rich_proxied_file", stream)


def _exact(text: str, encoding: str) -> bytes:
    """The bytes of a text, whose file names may hold some that are in no encoding."""
    try:
        return text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace")


def keep_standard_streams() -> None:
    """Opens what is closed of the standard streams, on nothing.

    The next file to be opened would get its number, and what libraries print on standard error
    would be written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def flush() -> None:
    """Writes what is still in the buffers; what can't be written then is dropped.

    To be called before Python ends, which would fail once more, with an exit code of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _silence(stream)


def _why_not_written(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return "the reader of standard output has gone: not all of the result was written"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is closed"
    return f"standard output can't be written: {reason}"


def _silence(stream: TextIO | None) -> None:
    """What is still in the buffer would fail once more when Python ends, with a traceback."""
    if stream in (sys.__stdout__, sys.__stderr__) and stream is not None:
        try:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())
        except (OSError, ValueError):
            pass

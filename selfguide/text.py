"""Text from outside, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, with control and direction characters written as escapes: a terminal obeys none of it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

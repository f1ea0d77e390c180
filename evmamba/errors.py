"""Problems that the user can mend, told apart from our own bugs."""

import difflib
import re
from collections.abc import Iterable

# What a terminal obeys instead of showing it, what turns the direction of writing, and halves of characters, which is
# how Python reads the bytes of a file's name that are no UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Something in the user's data, options or machine is wrong.

    The message is one line that says what is wrong, where, and what to do about it; the command line prints it without
    a traceback and exits with status 2. Names in it may be anybody's: see `printable`.
    """

    def __init__(self, message: str) -> None:
        if "\nOriginal Traceback" in message:
            # torch re-raises an error of a data loading process with that process's whole traceback as the message;
            # its last line is ours, "evmamba.errors.UserError: what is wrong".
            message = message.rstrip().splitlines()[-1].partition(": ")[2]
        super().__init__(printable(" ".join(message.split())))


def printable(text: str) -> str:
    """Text of strangers for a terminal, a log or a file: control characters and what is no Unicode become escapes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def first_few(items: Iterable[object], limit: int = 5, separator: str = ", ") -> str:
    """Name the first of many offenders: ``"a, b and 3 more"``, or ``"a is torn; b is torn; and 3 more"``.

    Args:
        items: what is named, by its text.
        limit: how many at most.
        separator: between them; one without a comma closes the list, too.
    """
    found = list(items)
    shown = separator.join(map(str, found[:limit]))
    if len(found) <= limit:
        return shown
    return f"{shown}{'' if separator == ', ' else separator.rstrip()} and {len(found) - limit} more"


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """Build the error for an unknown name, offering the nearest valid ones.

    Args:
        kind: what the name stands for, e.g. ``"model"``.
        name: what the user wrote.
        valid: every name that would have been right.
    """
    names = sorted(set(valid))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(near) + "?"
    elif len(names) <= 12:
        hint = "valid: " + ", ".join(names)
    else:
        hint = f"{len(names)} names are valid, none of them is similar"
    return UserError(f"unknown {kind} '{name}'; {hint}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__

"""The one error class that users see."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_TEXT = re.compile(
    r"(.*?)(?:\n  where: (.*?))?(?:\n  got: (.*?))?(?:\n  expected: (.*?))?(?:\n  fix: (.*))?", re.DOTALL
)


CLOSE = 0.6
"""Least likeness of a name that is worth suggesting, 0 to 1."""


class VitqError(Exception):
    """A user's mistake or a limit of the tool, told so that the user can act on it.

    Parameters
    ----------
    what : what is wrong, one sentence; or, alone, the whole text of such an error, which is taken apart: C++
        and pickle carry nothing but the text.
    where : the place in the user's terms: the model's own layer name, a file, an argument.
    got, expected : the offending value and what would have been accepted.
    fix : what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        if where is got is expected is fix is None and (text := _TEXT.fullmatch(what)):
            what, where, got, expected, fix = text.groups()
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        parts = [what]
        for label, value in (("where", where), ("got", got), ("expected", expected), ("fix", fix)):
            if value is not None:
                parts.append(f"  {label}: {value}")
        super().__init__("\n".join(parts))


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as text for an error message; empty if none is close. The beginning
    of a longer name counts as much as a whole one.
    """

    def likeness(other: str) -> float:
        parts = (other, other[: len(name)])
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    close = sorted((-likeness(other), len(other), other) for other in known)
    return ", ".join(other for score, _, other in close[:count] if -score >= CLOSE)

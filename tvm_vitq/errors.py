"""The one error class that users see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitqError(Exception):
    """A user's mistake or a limit of the tool, told so that the user can act on it.

    Parameters
    ----------
    what : what is wrong, one sentence.
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
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        parts = [what]
        for label, value in (("where", where), ("got", got), ("expected", expected), ("fix", fix)):
            if value is not None:
                parts.append(f"  {label}: {value}")
        super().__init__("\n".join(parts))


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as text for an error message; empty if none is close."""
    return ", ".join(difflib.get_close_matches(name, list(known), n=count, cutoff=0.5))

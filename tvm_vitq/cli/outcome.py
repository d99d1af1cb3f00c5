"""What a verb returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """data for --json, text for people, and whether the thresholds asked for were met."""

    data: Any
    text: str
    passed: bool = True

"""What a stranger might plant in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)

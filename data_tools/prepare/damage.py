"""Why a row or a file is refused."""

from __future__ import annotations


class Refused(Exception):
    """A row or a file that cannot be used: `kind` is counted in the report, `detail` says what was found."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"

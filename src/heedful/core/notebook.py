"""What a notebook shows of a value: its text as it is printed."""

from __future__ import annotations

from html import escape


def printed(value: object) -> str:
    return f'<pre style="line-height:1.35; overflow-x:auto">{escape(str(value))}</pre>'

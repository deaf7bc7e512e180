"""A document as a list of blocks, written as Markdown or as one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Block(Protocol):
    def markdown(self) -> str: ...

    def html(self) -> str: ...


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """Text with `code` in backquotes; `strong` sets it off as a notice."""

    text: str
    strong: bool = False

    def markdown(self) -> str:
        return f"**{self.text}**" if self.strong else self.text

    def html(self) -> str:
        return f"<p{' class=notice' if self.strong else ''}>{_coded(self.text)}</p>"


@dataclass(frozen=True)
class Points:
    items: tuple[str, ...]

    def markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)

    def html(self) -> str:
        return "<ul>" + "".join(f"<li>{_coded(item)}</li>" for item in self.items) + "</ul>"


@dataclass(frozen=True)
class Table:
    """The first column is a row's name and is set to the left, the others to the right unless `text`."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: bool = False

    def markdown(self) -> str:
        align = [":--", *([":--" if self.text else "--:"] * (len(self.head) - 1))]
        lines = [self.head, tuple(align), *(tuple(_cell(value) for value in row) for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def html(self) -> str:
        kind = "text" if self.text else "numbers"
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.head)
        rows = ("".join(f"<td>{_coded(value)}</td>" for value in row) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        return f'<div class="wide">{table}</div>'


@dataclass(frozen=True)
class Picture:
    title: str
    path: Path

    def markdown(self) -> str:
        return f"![{self.title}]({self.path.name})"

    def html(self) -> str:
        data = base64.b64encode(self.path.read_bytes()).decode("ascii")
        return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(self.title)}"></figure>'


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(block.html() for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c1c1c;background:#fff;margin:0}
main{max-width:68rem;margin:2rem auto;padding:0 1.25rem}
h1{font-size:1.7rem;line-height:1.25}h2{margin-top:2.4rem;font-size:1.25rem}h3{font-size:1.05rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;margin:.5rem 0}
th,td{padding:.35rem .7rem;border-bottom:1px solid #ddd;vertical-align:top;text-align:left}
th{border-bottom:2px solid #999}
.numbers td:not(:first-child),.numbers th:not(:first-child){text-align:right}
.numbers td{font-variant-numeric:tabular-nums}
.numbers td{white-space:nowrap}
td:first-child{white-space:nowrap;font-weight:600}.text td{min-width:9rem}
.notice{border-left:4px solid #D55E00;background:#fdf3ec;padding:.7rem 1rem}
img{max-width:100%;height:auto}figure{margin:1rem 0}
code{background:#f3f3f3;padding:.1em .3em;border-radius:3px;font-size:.9em;overflow-wrap:anywhere}
"""


def _coded(text: str) -> str:
    """Escaped, `x` as code and line breaks kept."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)).replace("\n", "<br>")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\r", "").replace("\n", "<br>")

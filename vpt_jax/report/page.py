# SPDX-License-Identifier: Apache-2.0
"""The frame of an HTML page that loads nothing: its look, its lists, its figures."""

import importlib.resources
import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any


def page(title: str, body: str, looks: tuple[str, ...] = ("report.css",)) -> str:
    """A whole page of a heading and HTML; `looks` are style sheets of `assets`."""
    assets = importlib.resources.files("vpt_jax") / "assets"
    css = "".join((assets / name).read_text(encoding="utf-8") for name in looks)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>
{css}</style></head><body>
<h1>{escape(title)}</h1>
{body}</body></html>
"""


def bullets(sentences: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in sentences)}</ul>"


def figures(
    svgs: Mapping[str, str],
    narrow: Mapping[str, str] | None = None,
    *,
    captions: Mapping[str, tuple[str, str]],
) -> str:
    """A section per figure, with the heading and caption of its name.

    `narrow` are the same ones as a phone shows them.
    """
    sections = []
    for name, svg in svgs.items():
        heading, caption = captions[name]
        card = f'<div class="card wide">{svg}</div>'
        if narrow:
            card = card.replace('"card wide', '"card wide on-screen')
            card += f'<div class="card on-phone">{narrow[name]}</div>'
        sections.append(
            f"<section><h2>{escape(heading)}</h2><figure>{card}"
            f'<figcaption class="soft"><p>{escape(caption)}</p></figcaption></figure>'
            "</section>"
        )
    return "".join(sections)


def details(content: Mapping[str, Any], headings: Mapping[str, str]) -> str:
    """Every value as text under its heading; by default that is its capitalised name.

    Empty values are left out.
    """
    parts = []
    for name, value in content.items():
        if not value:
            continue
        heading = headings.get(name, name.capitalize())
        text = value if isinstance(value, str) else json.dumps(value, indent=2)
        parts.append(f"<h2>{escape(heading)}</h2><pre>{escape(text)}</pre>")
    return "".join(parts)

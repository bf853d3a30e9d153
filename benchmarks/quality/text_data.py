"""Real text: pages of the English Wikipedia (in gensim's wheel) and pairs of country and capital (Debian bsdgames)."""

from __future__ import annotations

import bz2
import functools
import html
import re
import xml.etree.ElementTree as ElementTree

from .sources import debian_path, package_file

_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_QUIZ = "/usr/share/games/bsdgames/quiz"


def _without_nested(text: str, start: str, end: str) -> str:
    """Cut ``start ... end`` out, the innermost first."""
    a, b = re.escape(start), re.escape(end)
    pattern = re.compile(f"{a}(?:(?!{a}|{b}).)*{b}", re.DOTALL)
    while (shorter := pattern.sub("", text)) != text:
        text = shorter
    return text


def plain_text(markup: str) -> str:
    """Wiki markup -> text: no comments, references, templates, tables, pictures; links as their label; headings and
    lists stay."""
    text = re.sub(r"<!--.*?-->", "", markup, flags=re.DOTALL)
    text = re.sub(r"<ref[^>]*/>", "", text)
    text = re.sub(r"<ref.*?</ref>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(math|gallery|nowiki|timeline|code)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    text = _without_nested(_without_nested(text, "{{", "}}"), "{|", "|}")
    inside = r"(?:(?!\[\[|\]\]).)*"
    media = r"(?:File|Image|Category)\s*:"
    while True:  # links inside captions first
        changed = re.sub(rf"\[\[{media}{inside}\]\]", "", text, flags=re.DOTALL | re.IGNORECASE)
        changed = re.sub(
            rf"\[\[(?!{media})(?:(?!\[\[|\]\]|\|).)*\|({inside})\]\]", r"\1", changed, flags=re.DOTALL | re.IGNORECASE
        )
        changed = re.sub(
            rf"\[\[(?!{media})((?:(?!\[\[|\]\]|\|).)*)\]\]", r"\1", changed, flags=re.DOTALL | re.IGNORECASE
        )
        if changed == text:
            break
        text = changed
    text = re.sub(r"\[https?://\S+\s+([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[https?://[^\]]*\]", "", text)
    text = html.unescape(re.sub(r"'{2,}", "", re.sub(r"<[^>]+>", "", text)))
    lines = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


@functools.cache
def articles() -> list[tuple[str, str]]:
    """(title, text) of the 106 articles in the dump's order: redirects and pages under 200 characters left out.

    Raises:
        MissingError: gensim is not installed.
    """
    path = package_file("gensim", _DUMP, "gensim")
    with bz2.open(path) as file:
        root = ElementTree.parse(file).getroot()
    space = root.tag.split("}")[0] + "}"
    found = []
    for page in root.iter(f"{space}page"):
        markup = page.findtext(f"{space}revision/{space}text") or ""
        if page.findtext(f"{space}ns") == "0" and not markup.lower().startswith("#redirect"):
            text = plain_text(markup)
            if len(text) > 200:
                found.append((page.findtext(f"{space}title") or "", text))
    return found


@functools.cache
def capitals() -> list[tuple[str, str]]:
    """172 pairs of country and capital: entries in plain text of four continents, alternatives left out.

    Raises:
        MissingError: bsdgames is not installed.
    """
    folder = debian_path(_QUIZ, "bsdgames")
    pairs = []
    for name in ("africa", "america", "asia", "europe"):
        for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
            if line.count(":") == 1 and not re.search(r"[\[\]{}|\\]", line):
                country, capital = line.split(":")
                pairs.append((country, capital))
    return pairs

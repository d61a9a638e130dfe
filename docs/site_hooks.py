"""What the site needs beyond mkdocs (``mkdocs.yml`` names this file): pages that lie outside of docs/, the Markdown that a code host reads
and Python-Markdown does not, docstrings as Markdown, and ``llms.txt``.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import normwise as nw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import gallery  # noqa: E402 - beside this file

FROM_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
SOURCE = re.compile(r"\]\((?:\.\./)+((?:examples|src|tests)/[\w/.-]+)\.py\)")


# ---------------------------------------------------------------------------------------------------------- pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages of the gallery, in its order, under its tab."""
    [tab] = [entry["Gallery"] for entry in config.nav if "Gallery" in entry]
    families = {**gallery.FAMILIES, "Optimizers": tuple(map(str.lower, gallery.PRESETS))}
    tab += [{family: [f"gallery/{name}.md" for name in names]} for family, names in families.items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root, every example and each source file that a page links, and ``llms.txt``."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in FROM_ROOT)]
    for name in FROM_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    linked = {name for page in pages for name in SOURCE.findall(page.read_text(encoding="utf-8"))}
    for name in sorted(linked | {f"examples/{path.stem}" for path in (ROOT / "examples").glob("*.py")}):
        code = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        files.append(File.generated(config, f"{name}.md", content=f"# {name}.py\n\n````python\n{code}````\n"))
    files.append(File.generated(config, "llms.txt", content=for_models([(page, page.read_text(encoding="utf-8")) for page in pages])))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    return spaced(relinked(markdown, page.file.src_uri))


def relinked(text: str, name: str) -> str:
    """Links that leave docs/ lead to the pages that ``on_files`` added; those of a page from the root, which begin with docs/, do not."""
    if name in FROM_ROOT:
        return text.replace("](docs/", "](").replace("](README.md", "](index.md")
    text = SOURCE.sub(lambda m: f"{m[0][:2]}{'../' * name.count('/')}{m[1]}.md)", text)
    out = "../" * (name.count("/") + 1)
    return re.sub(rf"\]\({re.escape(out)}({'|'.join(map(re.escape, FROM_ROOT))})", rf"]({out[3:]}\1", text)


BEGINS = re.compile(r"(?:[-*]|\d+\.) |\||<!--")


def spaced(text: str) -> str:
    """A blank line before each list and table and around each comment, and no escapes in code of tables: a code host wants it otherwise."""
    found: list[str] = []
    fenced = False
    for given in text.splitlines():
        line = re.sub(r"`[^`]*`", lambda m: m[0].replace("\\|", "|"), given) if given.startswith("|") else given    # else the \\ is shown
        above = found[-1] if found else ""
        kind, kind_above = (m[0][:1] if (m := BEGINS.match(one)) else "" for one in (line, above))
        if not fenced and above and ((kind and kind != kind_above and not above.startswith("  ")) or above.endswith("-->")):
            found.append("")
        found.append(line)
        fenced ^= line.lstrip().startswith("```")
    return "\n".join(found)


def for_models(pages: list[tuple[Path, str]]) -> str:
    """https://llmstxt.org: the pages by title, each with its first sentence."""
    lines = ["# normwise", "", f"> {(nw.__doc__ or '').splitlines()[0].removeprefix('normwise: ')}", "", "## Pages", ""]
    for path, text in pages:
        title, _, rest = text.partition("\n")
        prose = re.sub(r"<!--.*?-->|```.*?```", "", rest, flags=re.DOTALL)
        first = next((part for part in prose.split("\n\n") if part.strip() and part.strip()[0] not in "|#!:"), "")
        sentence = " ".join(re.split(r"(?<=[.?])\s", first.strip(), maxsplit=1)[0].split())
        name = path.relative_to(ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT).with_suffix(".html")
        lines.append(f"- [{title.lstrip('# ').replace('`', '')}]({name}): {sentence}")
    return "\n".join([*lines[:6], *sorted(lines[6:])]) + "\n"


# ------------------------------------------------------------------------------------------------------ docstrings


class Docstrings(griffe.Extension):
    """Docstrings as Markdown; those that are completed when the package is imported, as they are then."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            preset = nw.optim.PRESETS.get(obj.name) if obj.is_class else None
            text = inspect.getdoc(preset) if preset is not None and preset.__module__ == obj.parent.path else None  # type: ignore[union-attr]
            obj.docstring.value = gallery.as_markdown(text or obj.docstring.value)

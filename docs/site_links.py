"""Makes the site of MkDocs from pages whose links are those of the tree.

The pages at the top of the tree belong to it, with README.md as the front page. A link to a file that is no page leads
to a copy of it, as plain text; one to a folder, to a list of its files. A page that would load anything from another
host fails.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
AT_THE_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
# `](target)`, and nothing that lies within a block of code.
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))|^```.*?^```$", re.MULTILINE | re.DOTALL)
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|link(?! rel=\"?canonical))\b[^>]*?\b(?:src|href)=\"?(https?:)?//"
)
COPIES = "tree"


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the pages at the top, and what any page links to in the tree."""
    for name in AT_THE_TOP:
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / name)))
    linked = set()
    for page in files.documentation_pages():
        assert page.abs_src_path is not None
        for match in LINK.finditer(Path(page.abs_src_path).read_text()):
            if match[1]:
                target = _target(match[1], _home(page.src_uri))
                if target is not None and target.exists() and files.get_file_from_path(_site_uri(target)) is None:
                    linked.add(target)
    for target in sorted(linked):
        content = target.read_text() if target.is_file() else _listing(target)
        files.append(File.generated(config, _site_uri(target), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links of the tree into links of the site; what leads nowhere stays, for MkDocs to refuse."""
    home = _home(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        target = _target(match[1], home) if match[1] else None
        if target is None or not target.exists():
            return match[0]
        anchor = urlsplit(match[1]).fragment
        uri = os.path.relpath(_site_uri(target), Path(page.file.src_uri).parent)
        return f"{uri}#{anchor}" if anchor else uri

    return LINK.sub(replaced, markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuses a page that loads something from another host.

    Raises:
        PluginError: It names the page and what it would load.
    """
    if match := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} would load from another host: {match[0]}")
    return output


def _home(uri: str) -> Path:
    """The folder of the tree that a page of the site has its links from."""
    return REPOSITORY if uri in AT_THE_TOP else (REPOSITORY / "docs" / uri).parent


def _target(link: str, home: Path) -> Path | None:
    """The file or folder that a link names; None for other hosts and for the page itself."""
    parts = urlsplit(link)
    return (home / parts.path).resolve() if parts.path and not parts.scheme and not parts.netloc else None


def _site_uri(target: Path) -> str:
    """Where a file or folder of the tree lies in the site's sources."""
    inside = target.relative_to(REPOSITORY)
    if target.is_dir():
        index = target / "README.md"
        return _site_uri(index) if index.exists() else f"{COPIES}/{inside}.txt"
    if str(inside) in AT_THE_TOP:
        return str(inside)
    if inside.parts[0] == "docs" and target.suffix in {".md", ".svg"}:
        return str(inside.relative_to("docs"))
    return f"{COPIES}/{inside}.txt"


def _listing(folder: Path) -> str:
    names = sorted(str(path.relative_to(REPOSITORY)) for path in folder.rglob("*") if path.is_file())
    return "".join(f"{name}\n" for name in names if "__pycache__" not in name)

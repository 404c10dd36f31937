"""Hook of mkdocs: links to files outside docs/ become plain paths, which the site can show."""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\[[^\]\n]+\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each link out of docs/ by the path from the root of the repository, as code."""
    del files
    docs = Path(config.docs_dir).resolve()
    folder = docs / PurePosixPath(page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri} links to {link[1]}, which does not exist")
        return f"`{target.relative_to(docs.parent).as_posix()}`"

    return _LINK.sub(plain, markdown)

"""The site's first page is README.md, with its links made those of the site."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Files that README names and that are not pages: shown as they are called.
BESIDE = re.compile(r"\[([^]]+)\]\((?:CONTRIBUTING\.md|CHANGELOG\.md|SECURITY\.md|CITATION\.cff)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri != "index.md":
        return markdown
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return BESIDE.sub(r"`\1`", text.replace("](docs/", "]("))

"""Let links work on the site as they do in the repository: a source file's link leads to its API reference."""

import re
from posixpath import dirname, normpath, relpath

SOURCE = re.compile(r"\]\(([^)\s]*?)refined_ldm/(\w+)\.py\)")
FILE = re.compile(r"\[([^\]]+)\]\((?:\.\./)*(environment\.yml|figures/claims\.yaml|CITATION\.cff|LICENSE)\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Rewrite links to source files; links to files that are no page become plain text."""
    reference = relpath("docs/api/core.md", normpath(dirname(page.file.src_uri)) or ".")
    markdown = SOURCE.sub(rf"]({reference}#refined_ldm.\2)", markdown)
    return FILE.sub(r"\1", markdown)

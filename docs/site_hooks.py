"""What the site needs beside its pages: the notebook of examples/, and links out of docs/.

Pages link to sources, results and the notebook by relative paths, which work in a checkout and in
the repository's own viewer. On the site they lead to the notebook's page, or to the repository.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
PICTURES = (".png", ".svg")  # a page shows the file itself, not the repository's view of it
NOTEBOOKS = ("examples/first_hour.ipynb",)

_LINK_UPWARDS = re.compile(r"(?<=\]\()(?P<path>\.\./[^)#\s]*)")


@event_priority(100)  # before mkdocs-jupyter, which looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks, which live beside the other examples."""
    for notebook in NOTEBOOKS:
        files.append(File(notebook, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links out of docs/ to where a reader of the site finds the file; it has to exist."""
    folder = posixpath.dirname(page.file.src_uri)
    docs = Path(config.docs_dir)

    def on_the_site(link: re.Match[str]) -> str:
        target = (docs / folder / link["path"]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link["path"]  # a page, or a mistake that the strict build names
        inside = target.relative_to(ROOT).as_posix()
        if inside in NOTEBOOKS:
            return posixpath.relpath(inside, folder or ".")
        kind = "tree" if target.is_dir() else "raw" if target.suffix in PICTURES else "blob"
        return f"{config.repo_url}/{kind}/{BRANCH}/{inside}"

    return _LINK_UPWARDS.sub(on_the_site, markdown)

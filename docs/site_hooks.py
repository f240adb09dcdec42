"""What the site needs beside its pages: links out of docs/, and the notebook of examples/.

Pages link to sources and results by relative paths, which work in a checkout and in the
repository's own viewer. A site has no such files, so that there they lead to the repository.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
NOTEBOOKS: tuple = ()

_LINK_UPWARDS = re.compile(r"(?<=\]\()(?P<path>\.\./[^)#\s]*)")


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks, which live beside the other examples."""
    for notebook in NOTEBOOKS:
        files.append(File.generated(config, notebook, abs_src_path=str(ROOT / notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files outside of docs/ to the repository; the file has to exist."""
    docs = Path(config.docs_dir)
    here = (docs / page.file.src_uri).parent

    def absolute(link: re.Match[str]) -> str:
        target = (here / link["path"]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link["path"]  # a page, or a mistake that the strict build names
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/{BRANCH}/{target.relative_to(ROOT).as_posix()}"

    return _LINK_UPWARDS.sub(absolute, markdown)

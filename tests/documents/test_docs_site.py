"""The site builds without a warning, and its pages hold what they promise."""

import dataclasses
import html
import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest
from snippets import DOCS, ROOT

import adapterkern as ak

INTEGRATIONS = ("adapterhub", "foreign", "peft", "transformers")


def public_names():
    """Every public name -> the path by which the API page heads it, and the object."""
    found = {f"adapterkern.{name}": getattr(ak, name) for name in ak.__all__}
    for integration in INTEGRATIONS:
        module = importlib.import_module(f"adapterkern.integrations.{integration}")
        for name in module.__all__:
            value = getattr(module, name)
            if value not in found.values():  # errors that an integration hands on
                found[f"{module.__name__}.{name}"] = value
    return found


def arguments_of(value):
    """The arguments that a signature has to show: those of its own, and none of an error."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return []
    arguments = inspect.signature(value).parameters
    if dataclasses.is_dataclass(value):  # PEFT's own are in its documentation
        return [name for name in arguments if name in inspect.get_annotations(value)]
    return list(arguments)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the site of this tree, from `mkdocs build --strict`."""
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    # Without it the theme speaks of its maker's next product in every build.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    build = subprocess.run(  # --quiet would hide warnings from --strict too
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    assert "WARNING" not in build.stdout + build.stderr
    return folder


def page_of(site, name):
    return (site / name / "index.html").read_text(encoding="utf-8")


def text_of(markup):
    """The words of a page, a space between any two."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


@pytest.fixture(scope="module")
def entries(site):
    """What the API page says of each name: all up to the heading of the next."""
    pytest.importorskip("peft")
    pytest.importorskip("adapters")
    parts = re.split(r'<h[23] id="([\w.]+)"', page_of(site, "api"))
    return dict(zip(parts[1::2], map(text_of, parts[2::2]), strict=True))


def test_api_page_holds_every_public_name_with_signature_and_docstring(entries):
    missing = []
    for path, value in public_names().items():
        path = {"adapterkern.backends": "adapterkern.dispatch.available"}.get(path, path)
        entry, name = entries.get(path, ""), path.rpartition(".")[2]
        docstring = re.sub(r"\W+", " ", inspect.getdoc(value).splitlines()[0])
        if docstring not in re.sub(r"\W+", " ", entry):
            missing.append(f"{path}: docstring")
        signature = entry.partition(f"{name} (")[2].partition(" ) ")[0].split()
        missing += [f"{path}: {a}" for a in arguments_of(value) if a not in signature]
    assert missing == []


def test_docstrings_name_arguments_that_exist():
    """The site's builder would warn of these, and of two in one line as well."""
    unknown = []
    for path, value in public_names().items():
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(value), re.M | re.S)
        if section:
            lines = re.findall(r"^    (\w+(?:, \w+)*):", section[1], re.M)
            named = {name for line in lines for name in line.split(", ")}
            unknown += [
                f"{path}: {name}" for name in named - {*inspect.signature(value).parameters}
            ]
    assert unknown == []


def test_api_page_documents_arguments_as_a_list(entries):
    """What griffe cannot parse stays one paragraph of text."""
    for path in ("adapterkern.BottleneckAdapter", "adapterkern.insert", "adapterkern.warmup"):
        assert "Parameters:" in entries[path]
        assert "Args:" not in entries[path]


def test_navigation_lists_every_page_and_the_notebook(site):
    before_the_text = (site / "index.html").read_text(encoding="utf-8").partition("<article")[0]
    listed = set(re.findall(r'href="([\w/.-]*)"', before_the_text))
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in DOCS}
    assert {f"{page}/" for page in pages - {"index"}} | {"examples/first_hour/"} <= listed


def test_pages_load_nothing_from_elsewhere(site):
    for page in ("index.html", "api/index.html", "math/index.html"):
        markup = (site / page).read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', markup)
        assert loaded == []


def test_pictures_out_of_the_pages_are_the_files_themselves(site):
    shown = re.findall(r'<img[^>]*src="(https:[^"]*)"', page_of(site, "demo"))
    assert all("/raw/main/benchmarks/results/" in picture for picture in shown)
    assert shown or "No run of five seeds" in page_of(site, "demo")


def test_links_out_of_the_pages_lead_to_the_repository(site):
    found = re.findall(r'href="([^"]*many_tasks\.py)"', page_of(site, "many-adapters"))
    assert set(found) == {
        "https://github.com/adapterkern/adapterkern/blob/main/examples/many_tasks.py"
    }

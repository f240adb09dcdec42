"""Real text that every Python install carries: the docstrings of its standard library.

Two tasks share the texts: the topic of the module that a docstring stands in, and the kind of
object that it describes. Sources are parsed, never imported.
"""

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Topic -> its modules, after the chapters of the Python library reference. A module that this
# Python does not have is skipped.
TOPICS = {
    "text": "codecs difflib encodings gettext locale re string stringprep textwrap",
    "data types": """_collections_abc bisect calendar collections copy dataclasses datetime enum
        graphlib heapq pprint reprlib types weakref zoneinfo""",
    "numbers": "_pydecimal colorsys fractions numbers operator random statistics",
    "files": """_pyio filecmp fileinput fnmatch genericpath glob linecache ntpath os pathlib
        posixpath shutil stat tempfile""",
    "archives": "bz2 copyreg dbm gzip lzma pickle pickletools shelve tarfile zipapp zipfile",
    "concurrency": """asyncio concurrent multiprocessing queue sched selectors subprocess
        threading""",
    "internet": """ftplib http imaplib ipaddress nntplib poplib smtplib socket socketserver ssl
        telnetlib urllib uuid webbrowser wsgiref xmlrpc""",
    "mail and markup": """base64 configparser csv email html json mailbox mimetypes netrc plistlib
        tomllib xml""",
    "user interface": "argparse cmd curses getpass logging optparse shlex tkinter turtle",
    "development": """bdb cProfile doctest pdb profile pstats pydoc timeit trace traceback
        tracemalloc unittest""",
    "language": """ast code codeop compileall dis importlib inspect modulefinder pkgutil py_compile
        pyclbr runpy symtable tokenize typing zipimport""",
}
KINDS = ("module", "class", "function", "method", "special method")

MIN_WORDS = 4  # shorter ones ("See above.") say nothing about either label
KEY_WORDS = 25  # texts that agree this far count as one: the model reads about that much
MODULE_CAP = 60  # no single module may carry a topic
TOPIC_CAP = 230  # 11 topics: about 2,500 texts, near equal shares
HELD_OUT_SHARE = 0.2

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
_SIGNATURE = re.compile(r"^[\w.]+\s*\([^)]*\)\s*(->|--|:)?\s*")


class CorpusError(RuntimeError):
    """The standard library's sources cannot be read."""


@dataclass(frozen=True)
class Docstring:
    """One text with its two labels; `module`, where it comes from, is never shown to the model."""

    text: str
    module: str
    topic: str
    kind: str


@dataclass(frozen=True)
class Task:
    """A labelling of the texts: `labels[i]` is the class number's name."""

    name: str
    labels: tuple[str, ...]

    def targets(self, docs: list[Docstring]) -> list[int]:
        """Class numbers of the texts."""
        return [self.labels.index(getattr(doc, self.name)) for doc in docs]

    def counts(self, docs: list[Docstring]) -> list[int]:
        """How many texts each class has, in the order of `labels`."""
        found = Counter(self.targets(docs))
        return [found[number] for number in range(len(self.labels))]

    def majority_share(self, docs: list[Docstring]) -> float:
        """Accuracy of always naming the most frequent class."""
        return max(self.counts(docs)) / len(docs)


TASKS = (Task("topic", tuple(TOPICS)), Task("kind", KINDS))


@dataclass(frozen=True)
class Corpus:
    """The two halves; no text, as far as the model reads it, stands in both."""

    train: list[Docstring]
    held_out: list[Docstring]

    @property
    def modules(self) -> set[str]:
        """Names of the modules that the texts come from."""
        return {doc.module for doc in self.train + self.held_out}


def load_corpus(library: Path | None = None) -> Corpus:
    """Docstrings of the modules in TOPICS: no two the same, capped, split by a hash of the text.

    The result depends on the Python version alone: no seed, no order of files on disk.

    Args:
        library: folder of the standard library's sources; default: this interpreter's.

    Raises:
        CorpusError: no sources there (a frozen or zipped Python).
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    chosen: list[Docstring] = []
    for topic, modules in TOPICS.items():
        candidates: list[Docstring] = []
        for module in modules.split():
            fresh = {}
            for kind, text in _module_docstrings(library, module):
                key = text_key(text)
                if key not in seen:
                    fresh[key] = Docstring(text, module, topic, kind)
                    seen.add(key)
            candidates += balanced(list(fresh.values()), MODULE_CAP)
        chosen += balanced(candidates, TOPIC_CAP)
    if not chosen:
        raise CorpusError(
            f"expected the standard library's sources under {library}, found no docstrings.\n"
            "  hint: a frozen or zipped Python does not carry them; use an ordinary Python install."
        )
    chosen.sort(key=lambda doc: _hash("split", doc.text))
    num_held_out = round(HELD_OUT_SHARE * len(chosen))
    return Corpus(train=chosen[num_held_out:], held_out=chosen[:num_held_out])


def text_key(text: str) -> str:
    """The first words in lower case, letters only; texts with the same key count as one."""
    return " ".join(re.findall(r"[a-z]+", text.lower())[:KEY_WORDS])


def balanced(docs: list[Docstring], cap: int) -> list[Docstring]:
    """Take at most `cap` texts, kinds in turn, so that methods do not crowd out the rest."""
    docs = sorted(docs, key=lambda doc: _hash("choice", doc.text))
    queues = [[doc for doc in docs if doc.kind == kind] for kind in KINDS]
    taken: list[Docstring] = []
    for rank in range(max(map(len, queues))):
        taken += [queue[rank] for queue in queues if rank < len(queue)]
    return taken[:cap]


def _module_docstrings(library: Path, module: str) -> Iterator[tuple[str, str]]:
    for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
        if not path.is_file() or _TEST_FOLDERS & set(path.relative_to(library).parts):
            continue
        file_name = path.parent.name if path.name == "__init__.py" else path.stem
        for kind, node in _objects(ast.parse(path.read_bytes()), "module"):
            text = _clean(ast.get_docstring(node) or "", getattr(node, "name", file_name))
            if len(text.split()) >= MIN_WORDS:
                yield kind, text


def _objects(node: Documented, kind: str) -> Iterator[tuple[str, Documented]]:
    """(kind, node) of all that can have a docstring, functions inside functions left out."""
    yield kind, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _objects(child, "class")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            special = child.name.startswith("__") and child.name.endswith("__")
            method = "special method" if special else "method"
            yield ("function" if kind == "module" else method), child


def _clean(text: str, name: str) -> str:
    """The prose alone: no leading signature, and the object's own name never spelt out."""
    text = _SIGNATURE.sub("", text, count=1)
    return " ".join(re.sub(rf"\b{re.escape(name)}\b", "it", text).split())


def _hash(purpose: str, text: str) -> bytes:
    """A random but fixed order, one for each purpose: else the choice would bias the split."""
    return hashlib.sha256(f"{purpose}:{text}".encode()).digest()

"""The files for a GPU machine without a network: the extension, wheels, Triton's kernels, and the
tree's commit.

`create` fills an ignored folder here; `Pack` reads it there, with the standard library alone.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu"
MOST_BYTES = 48 * 2**20
# The sources on which a run's results depend.
SOURCES = ("adapterkern", "benchmarks", "csrc", "tests", "setup.py", "pyproject.toml")
_GENERATED = ("__pycache__", "_buildinfo.py", "results")
# The baselines need these beside torch and triton. The adapters library pins a transformers of its
# own, which then serves every variant of a model.
WHEELS = (
    *("adapters==1.3.0", "transformers==4.57.6", "tokenizers==0.22.2"),
    *("huggingface_hub==0.36.2", "peft==0.21.2", "nvmath-python==1.0.0"),
)
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_BUILD_TOOLS = ("setuptools>=77", "pybind11>=2.13", "ninja>=1.11")


MACHINE_PYTHON = "3.12"  # the GPU machines'
KERNELS = "kernels.tar.xz"  # of Triton's cache what it reads to load a kernel
_LOADED = (".cubin", ".json")
_NOTE = "__grp__"
CACHE = ROOT / "build" / "triton-cache"  # of a run whose pack has kernels


class PackError(RuntimeError):
    """A folder that cannot be made, or that does not fit the tree or this Python."""


def digest(root: Path = ROOT) -> str:
    """Return a hash of the sources, to which a packed extension and commit belong."""
    found = hashlib.sha256()
    for name in SOURCES:
        path = root / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            parts = file.relative_to(root).parts
            ignored = file.suffix in (".so", ".pyc") or set(_GENERATED) & set(parts)
            if file.is_file() and not ignored:
                found.update(f"{file.relative_to(root).as_posix()}\0".encode())
                found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def commit_of(root: Path = ROOT) -> tuple[str, bool] | None:
    """Return (commit, whether the tree differs from it) by git, None without a work tree of it."""
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    top = _output(["git", "-C", str(root), "rev-parse", "--show-toplevel"])
    if not commit or top is None or Path(top).resolve() != root.resolve():
        return None
    scope = ["--", *SOURCES, ":(exclude)benchmarks/results"]
    return commit, bool(_output(["git", "-C", str(root), "status", "--porcelain", *scope]))


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class Pack:
    """A packed folder. suffix: the extension's, which names the Python that loads it; triton: the
    key of the Triton that finds the kernels (`machine.triton_key`), None if there are none.
    """

    folder: Path
    commit: str
    dirty: bool
    digest: str
    suffix: str
    triton: str | None = None

    @classmethod
    def read(cls, folder: Path = FOLDER) -> "Pack | None":
        """Return the pack in a folder, None where there is none.

        Raises:
            PackError: it is damaged or incomplete.
        """
        path = folder / "pack.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            keys = ("commit", "dirty", "digest", "suffix", "triton")
            return cls(folder, *(found[key] for key in keys))
        except (OSError, ValueError, KeyError) as error:
            raise PackError(
                f"{path} cannot be read ({error!r}).\n  hint: python -m benchmarks pack"
            ) from error

    def fits(self, root: Path = ROOT) -> bool:
        """Return whether it was packed from the sources of this tree."""
        return digest(root) == self.digest

    def check(self, root: Path = ROOT) -> None:
        """Refuse a pack of other sources: its commit and its extension would not be this tree's.

        Raises:
            PackError: the tree has changed since.
        """
        if not self.fits(root):
            raise PackError(
                f"{self.folder} was packed from other sources than this tree.\n"
                "  hint: commit, then run `python -m benchmarks pack` again"
            )

    def unpack(self, site: Path, root: Path, suffix: str, say: Callable[[str], Any]) -> None:
        """Put wheels into `site`, kernels into CACHE, and the extension into the package if it fits
        this Python."""
        if self.triton is not None:
            restore(self.folder / KERNELS, CACHE)
        for wheel in sorted((self.folder / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        if suffix != self.suffix:
            say(f"the packed extension is for {self.suffix}, this Python loads {suffix}")
            return
        for file in (self.folder / "extension").iterdir():
            shutil.copy2(file, root / "adapterkern" / file.name)


def create(
    python: Sequence[str],
    archs: str,
    say: Callable[[str], Any],
    folder: Path = FOLDER,
    triton: Sequence[str] | None = None,
) -> Pack:
    """Build the extension for another Python, fetch the wheels, and write the commit.

    Args:
        python: the interpreter to build for, as a command; it needs no torch.
        archs: as ADAPTERKERN_CUDA_ARCHS takes them.
        triton: an interpreter with the GPU machine's torch and Triton, which compiles Triton's
            kernels; None leaves that to the run.

    Raises:
        PackError: no commit, no such Python, a build, a compilation or a download that fails, or
            too many bytes.
    """
    found = commit_of()
    if found is None:
        raise PackError(f"{ROOT} has no git commit, and a run refuses to measure without one.")
    (commit, dirty), sources = found, digest()
    about = _facts(python)
    if triton is not None and _facts(triton) != about:
        raise PackError(
            f"{' '.join(triton)} is no Python {about['version']}, which the extension is for; "
            "its Triton names kernels otherwise.\n  hint: name another with --triton"
        )
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("extension", "wheels"):
        (folder / name).mkdir(parents=True)
    say(f"building the extension for Python {about['version']}, {archs}")
    _build(python, archs, folder / "extension")
    say(f"fetching {len(WHEELS)} wheels")
    _fetch(about["version"], folder / "wheels")
    key = None
    if triton is not None:
        say("compiling Triton's kernels, for some minutes")
        key = _compile(triton, folder / KERNELS)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise PackError(f"{folder} has {size / 2**20:.1f} MiB, at most {MOST_BYTES // 2**20} fit.")
    if digest() != sources:
        raise PackError(
            "The sources changed meanwhile, and the pack would be of neither state.\n"
            "  hint: run it again, and leave them alone"
        )
    content = {"commit": commit, "dirty": dirty, "digest": sources, "suffix": about["suffix"]}
    content["triton"] = key
    (folder / "pack.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    say(f"{folder}: {size / 2**20:.1f} MiB, commit {commit[:12]}{' with changes' * dirty}")
    return Pack(folder, **content)


def default_python() -> list[str]:
    """Return a Python of the GPU machines' version: this one, one on the path, or one of pyenv's.

    Raises:
        PackError: there is none.
    """
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [sys.executable, f"python{MACHINE_PYTHON}"]
    candidates += map(str, sorted(versions.glob(f"{MACHINE_PYTHON}*/bin/python3"), reverse=True))
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if _output([candidate, "-c", code]) == MACHINE_PYTHON:
            return [candidate]
    raise PackError(
        f"no Python {MACHINE_PYTHON} found (tried {', '.join(candidates)}).\n"
        "  hint: name one with --python; it needs its headers, and no package"
    )


def _facts(python: Sequence[str]) -> dict[str, str]:
    code = (
        "import json, sys, sysconfig; print(json.dumps({'version': '%d.%d' % sys.version_info[:2], "
        "'suffix': sysconfig.get_config_var('EXT_SUFFIX')}))"
    )
    text = _output([*python, "-c", code])
    try:
        return json.loads(text or "")
    except json.JSONDecodeError as error:
        raise PackError(
            f"{' '.join(python)} is no Python that runs.\n  hint: name one with --python"
        ) from error


def _build(python: Sequence[str], archs: str, target: Path) -> None:
    """Build in a folder that stays, so that a second pack compiles only changed sources."""
    place = ROOT / "build" / "gpu-pack"
    venv = place / "venv"
    _call([*python, "-m", "venv", str(venv)], {})
    own = str(venv / "bin" / "python")
    _call([own, "-m", "pip", "install", "-q", *_BUILD_TOOLS], {})
    shutil.rmtree(place / "lib", ignore_errors=True)
    command = [own, "setup.py", "build_ext", "--build-lib", str(place / "lib")]
    settings = {"ADAPTERKERN_BUILD_CUDA": "1", "ADAPTERKERN_CUDA_ARCHS": archs}
    _call([*command, "--build-temp", str(place / "objects")], settings)
    for file in (place / "lib" / "adapterkern").iterdir():
        shutil.copy2(file, target / file.name)


def _compile(python: Sequence[str], target: Path) -> str:
    """Compile Triton's kernels into an archive; return the key of the Triton that finds them.

    Raises:
        PackError: some call cannot be compiled.
    """
    shards = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [*python, "-m", "benchmarks.gpu.kernels"]
        running = [
            subprocess.Popen(
                [*command, str(shard), str(shards)], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for shard in range(shards)
        ]  # fmt: skip
        ends = [(*each.communicate(), each.returncode) for each in running]
        if any(code for *_, code in ends):
            says = [errors.strip() or f"exit code {code}" for _, errors, code in ends if code]
            lines = "\n".join(says).splitlines()[-12:]
            raise PackError("\n".join([f"{' '.join(command)} failed:", *lines]))
        archive(Path(cache), target)
    return ends[0][0].strip()


def archive(cache: Path, target: Path) -> None:
    """Write what Triton loads of its cache into one file."""
    with tarfile.open(target, "w:xz", preset=3) as file:
        for path in sorted(cache.rglob("*")):
            if path.suffix in _LOADED:
                file.add(path, path.relative_to(cache))


def restore(archived: Path, cache: Path) -> None:
    """Unpack such a file. Triton notes with each kernel where its files lie."""
    with tarfile.open(archived) as file:
        file.extractall(cache, filter="data")
    for note in cache.glob(f"*/{_NOTE}*"):
        known = json.loads(note.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(note.parent / name) for name in known if (note.parent / name).exists()}
        note.write_text(json.dumps({"child_paths": here}), encoding="utf-8")


def _fetch(version: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    _call([*command, *WHEELS], {})


def _call(command: list[str], settings: Mapping[str, str]) -> None:
    environment = {**os.environ, **settings}
    environment.pop("PIP_CONSTRAINT", None)  # it belongs to this environment, not to the other
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        says = (done.stderr or done.stdout).strip().splitlines()[-12:]
        raise PackError("\n".join([f"{' '.join(command)} failed:", *says]))

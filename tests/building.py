"""setup.py as a module, and builds with it in folders of a test's own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution, Extension

ROOT = Path(__file__).resolve().parents[1]
BUILD_VARIABLES = ("ADAPTERKERN_BUILD_CUDA", "ADAPTERKERN_CUDA_ARCHS", "MAX_JOBS")


def _load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adapterkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = _load_setup()


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def run_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> Path:
    """Run build_ext with these build variables alone; return the built package's folder."""
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    extension = Extension(build.EXTENSION, sources=[], optional=True)
    command = build.BuildCuda(Distribution({"name": "adapterkern", "ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    command.run()
    package = tmp_path / "lib" / "adapterkern"
    listed = {Path(output) for output in command.get_outputs()}
    assert listed == set(package.iterdir())
    return package


def recorded(package: Path) -> dict:
    values: dict = {}
    exec((package / "_buildinfo.py").read_text(), values)
    return values


def built_extensions(package: Path) -> list[Path]:
    return list(package.glob("_cuda*.so"))

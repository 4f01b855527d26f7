"""Native parts only; everything else is in pyproject.toml.

* `heapledger/_preload/libheapledger.so`: the shim, a plain shared library without Python in it, found at run time
  beside `heapledger/_preload/__init__.py`.
* `heapledger.analyzer.glibc._compiled`: the malloc model, the same source that also runs interpreted: the mechanism
  files are joined into one Cython module, so that calls between them are C calls.
* `heapledger.store._codec`: the codecs of event and node blocks. A trace can be neither written nor read without it.
* `heapledger.tracer._drain`: the collector's inner loop, from the program's rings to encoded blocks.
* `heapledger.tracer._nodes`, `heapledger.tracer._pages`: call stacks and pages on their way into the trace file.
* `heapledger.analyzer._lifetimes`: blocks from allocation to release, in the analyzer. Where it was not built, Python
  dictionaries do the same, much slower.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SHIM = "heapledger._preload.libheapledger"


def cython_extensions() -> list[Extension]:
    """Each folder with a `_amalgamate.py` beside it names its own parts; see there."""
    from Cython.Build import cythonize

    extensions = []
    for folder, module in (
        ("analyzer/glibc", "heapledger.analyzer.glibc._compiled"),
        ("tracer/symbols", "heapledger.tracer.symbols._compiled"),
    ):
        script = ROOT / folder / "_amalgamate.py"
        if script.exists():
            subprocess.run([os.sys.executable, str(script)], check=True)  # type: ignore[attr-defined]
            source = os.path.relpath(ROOT / folder / "_compiled.py", ROOT)
            extensions.append(Extension(module, [source], extra_compile_args=["-O3", "-Wno-sign-compare"]))
    for source, module in (
        ("analyzer/_lifetimes.pyx", "heapledger.analyzer._lifetimes"),
        ("tracer/_nodes.pyx", "heapledger.tracer._nodes"),
        ("tracer/_pages.pyx", "heapledger.tracer._pages"),
    ):
        extensions.append(Extension(module, [source], extra_compile_args=["-O3"]))
    codec = ROOT / "src/heapledger/store"
    extensions.append(
        Extension(
            "heapledger.store._codec",
            ["src/heapledger/store/_codec.pyx", *relative(codec.glob("*codec*.c"), "_codec.c")],
            depends=relative(codec.glob("*.h")),
            include_dirs=[os.path.relpath(codec, ROOT)],
            extra_compile_args=["-O3"],
        )
    )
    extensions.append(drain_extension())
    return list(cythonize(extensions, language_level=3, include_path=[str(ROOT / "src")])) if extensions else []


def relative(paths: Iterable[Path], *but: str) -> list[str]:
    """Sorted, and seen from here, as setuptools wants them."""
    return sorted(os.path.relpath(path, ROOT) for path in paths if path.name not in but)


def drain_extension() -> Extension:
    tracer = ROOT / "tracer"
    return Extension(
        "heapledger.tracer._drain",
        ["tracer/_drain.pyx", *relative(tracer.glob("[!_]*.c")), "src/heapledger/store/codec.c"],
        depends=[*relative(tracer.glob("*.h")), "src/heapledger/store/codec.h", "preload/spool.h"],
        include_dirs=["tracer"],
        extra_compile_args=["-O3", "-pthread"],
        extra_link_args=["-pthread"],
    )


class BuildExt(build_ext):
    """Builds the shim with plain compiler flags and gives it a plain name."""

    def get_ext_filename(self, fullname: str) -> str:
        # Asked for the full dotted name, or for its last part where only the file's name is wanted.
        if fullname.split(".")[-1] == SHIM.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        if ext.name != SHIM:
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["make", "-C", str(ROOT / "preload"), f"OUT={target.resolve()}", "-s"], check=True)


def shim_extension() -> Extension:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "preload").glob("*.c"))
    return Extension(SHIM, sources, depends=[str(p.relative_to(ROOT)) for p in (ROOT / "preload").glob("*.h")])


setup(ext_modules=[shim_extension(), *cython_extensions()], cmdclass={"build_ext": BuildExt})

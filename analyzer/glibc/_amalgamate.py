"""Joins the mechanism files into one Cython source, `_compiled.py`, so that calls between them are C calls.

Run by setup.py; needs nothing but Python. What it does to the text, and all it does:

* docstrings of modules and imports of this package are dropped, other imports are kept once;
* `cyshim` becomes Cython's own `cython`, its view types contiguous typed memoryviews;
* the names of constants.py are replaced by their numbers;
* C functions are marked as raising nothing: they do arithmetic on arrays they have bounds for.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "heapledger.analyzer.glibc"

#: In the order of their dependencies.
PARTS = (
    "chunk",
    "shadow",
    "blocks",
    "bins",
    "tcache",
    "fastbin",
    "trim",
    "free",
    "top",
    "mmapped",
    "alloc",
    "realloc",
    "memalign",
    "options",
    "force",
    "drive",
    "export",
    "check",
)

HEADER = '''\
# mypy: ignore-errors
# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True,
# infer_types=True
"""Written by _amalgamate.py from the mechanism files beside it; not to be edited, not to be committed."""

from __future__ import annotations

import cython

COMPILED = True
'''

VIEWS = {
    "cython.int_view": "cython.int[::1]",
    "cython.long_view": "cython.longlong[::1]",
    "cython.byte_view": "cython.uchar[::1]",
    "cython.uint_view": "cython.uint[::1]",
}


def constants() -> dict[str, str]:
    """Name → number, as text, of constants.py."""
    found = {}
    for node in ast.parse((HERE / "constants.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = str(ast.literal_eval(node.value))
    return found


def without_imports(source: str, kept: set[str]) -> str:
    """The source without its docstring and imports; those of other packages are added to `kept`."""
    lines = source.splitlines()
    for position, node in enumerate(ast.parse(source).body):
        is_docstring = position == 0 and isinstance(node, ast.Expr)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(node)
            if PACKAGE not in text and "__future__" not in text:
                kept.add(text)
        elif not is_docstring:
            continue
        for line in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[line] = ""
    return "\n".join(lines) + "\n"


def with_numbers(source: str, numbers: dict[str, str]) -> str:
    """The source with every constant's name replaced."""
    lines = source.splitlines(keepends=True)
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(source).readline))):
        if token.type == tokenize.NAME and token.string in numbers:
            row, column = token.start
            line = lines[row - 1]
            number = numbers[token.string]
            number = f"({number})" if number.startswith("-") else number
            lines[row - 1] = line[:column] + number + line[column + len(token.string) :]
    return "".join(lines)


def amalgamated() -> str:
    """The whole Cython source."""
    numbers = constants()
    imports: set[str] = set()
    parts = []
    for name in PARTS:
        text = with_numbers(without_imports((HERE / f"{name}.py").read_text(), imports), numbers)
        parts.append(f"\n# ---- {name}.py ----\n{text.strip()}\n")
    body = "\n".join(parts)
    for view, memoryview in VIEWS.items():
        body = body.replace(view, memoryview)
    body = body.replace("@cython.cfunc\n", "@cython.cfunc\n@cython.exceptval(check=False)\n")
    return HEADER + "\n".join(sorted(imports)) + "\n" + body


def main() -> None:
    """Writes `_compiled.py`, only if it would change: setuptools goes by the date."""
    target = HERE / "_compiled.py"
    text = amalgamated()
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


if __name__ == "__main__":
    main()

"""Stands in for Cython's `cython` module when the model runs interpreted, so that Cython is needed to build, not
to run.

The mechanism files are written in Cython's pure-Python mode and import this module under the name `cython`;
`_amalgamate.py` puts the real one in its place. Only what they use is here. The views are this project's own names: the
amalgamated file spells them as contiguous typed memoryviews.
"""

from __future__ import annotations

import builtins
from array import array
from typing import Any, TypeAlias, TypeVar

_T = TypeVar("_T")

compiled = False

longlong: TypeAlias = builtins.int
bint: TypeAlias = builtins.bool
void: TypeAlias = None

int_view: TypeAlias = "array[builtins.int]"  #: C int
long_view: TypeAlias = "array[builtins.int]"  #: C long long
byte_view: TypeAlias = "array[builtins.int]"  #: C unsigned char
uint_view: TypeAlias = "array[builtins.int]"  #: C unsigned int


def cclass(thing: _T) -> _T:
    """A class that becomes a C struct."""
    return thing


def cfunc(thing: _T) -> _T:
    """A function that becomes a C function."""
    return thing


def inline(thing: _T) -> _T:
    """A C function worth inlining."""
    return thing


def final(thing: _T) -> _T:
    """A class that nothing inherits from."""
    return thing


def declare(_kind: Any, value: _T) -> _T:
    """A typed variable."""
    return value

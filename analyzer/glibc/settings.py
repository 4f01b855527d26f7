"""What a user can tell malloc from outside: GLIBC_TUNABLES and the MALLOC_* variables.

Rules: ../shared/specs/glibc-malloc.md §12. The tunables win over nothing here by order: glibc takes variables in the
order of the environment, and an alias is the same tunable; one that is named in GLIBC_TUNABLES and by its alias is rare
enough that GLIBC_TUNABLES is simply preferred.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Alias → tunable. The last two have no trailing underscore in glibc.
ALIASES = {
    "MALLOC_CHECK_": "check",
    "MALLOC_TOP_PAD_": "top_pad",
    "MALLOC_PERTURB_": "perturb",
    "MALLOC_MMAP_MAX_": "mmap_max",
    "MALLOC_MMAP_THRESHOLD_": "mmap_threshold",
    "MALLOC_TRIM_THRESHOLD_": "trim_threshold",
    "MALLOC_ARENA_MAX": "arena_max",
    "MALLOC_ARENA_TEST": "arena_test",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Tunables as set; None where the default holds. Sizes in bytes."""

    top_pad: int | None = None
    trim_threshold: int | None = None
    mmap_threshold: int | None = None
    mmap_max: int | None = None
    mxfast: int | None = None
    tcache_count: int | None = None
    tcache_max: int | None = None
    tcache_unsorted_limit: int | None = None
    arena_max: int | None = None
    arena_test: int | None = None
    hugetlb: int | None = None
    check: int | None = None
    perturb: int | None = None

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Settings:
        """Reads the variables of a traced process; what cannot be read as a number is ignored, as glibc does."""
        values: dict[str, int] = {}
        for alias, name in ALIASES.items():
            number = _number(env.get(alias, ""))
            if number is not None:
                values[name] = number
        for item in env.get("GLIBC_TUNABLES", "").split(":"):
            key, _, text = item.partition("=")
            name = key.removeprefix("glibc.malloc.")
            number = _number(text)
            if name != key and name in cls.__slots__ and number is not None:
                values[name] = number
        return cls(**values)


def _number(text: str) -> int | None:
    """A number as glibc's loader reads it: decimal, 0x hex or 0 octal, with a sign, and nothing behind it."""
    body = text[1:] if text[:1] in "+-" else text
    base = 16 if body[:2].lower() == "0x" else 8 if body[:1] == "0" else 10
    try:
        value = int(body[2:] if base == 16 else body, base) if body and "_" not in body else None
    except ValueError:
        return None
    if value is None or body[:1] in "+- ":
        return None
    return -value if text[:1] == "-" else value

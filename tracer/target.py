"""Can this program be traced, and if not, why: looked at with pyelftools before it starts.

Refused, because the shim would not be loaded or the program would not start: what is not there or not executable, what
is neither ELF nor a script, other architectures, static programs, musl, programs that change identity (the loader
ignores LD_PRELOAD for them), sanitizers that insist on being the first library. Warned about: other allocators. (What
that program starts in turn is looked at by the shim, preload/program.c, which never refuses: see docs/programs.md.)
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from heapledger.errors import TargetError

_MAX_SCRIPT_DEPTH = 4
_MACHINES = {
    "EM_AARCH64": "aarch64",
    "EM_ARM": "32-bit Arm",
    "EM_386": "32-bit x86",
    "EM_RISCV": "RISC-V",
    "EM_PPC": "PowerPC",
    "EM_PPC64": "PowerPC",
    "EM_S390": "S/390",
    "EM_MIPS": "MIPS",
}
#: An entry of a symbol table: st_name, st_info, st_other, st_shndx, st_value, st_size.
_SYMBOL = struct.Struct("<IBBHQQ")
_STT_FUNC = 2
_ALLOCATORS = ("libjemalloc", "libtcmalloc", "libmimalloc", "libhoard", "libsnmalloc")
_SANITIZERS = {"libasan": "AddressSanitizer", "libtsan": "ThreadSanitizer", "libhwasan": "HWAddressSanitizer"}
_SANITIZERS |= {"liblsan": "LeakSanitizer", "libclang_rt.asan": "AddressSanitizer"}
#: A symbol table larger than this is not searched for a private malloc (bytes).
_MAX_SYMTAB = 64 << 20


@dataclass(slots=True)
class Target:
    """A program that can be traced. `program` is the ELF file that runs: the interpreter, for a script."""

    path: str
    program: str
    script: bool = False
    warnings: list[str] = field(default_factory=list)


def examine(name: str, environment: Mapping[str, str]) -> Target:
    """Finds `name` as a shell would and looks at it. TargetError with the reason when it cannot be traced."""
    path = _find(name, environment)
    program, script = _program_of(path, environment)
    target = Target(path, program, script)
    _check_identity(program, refused=not script, warnings=target.warnings)
    _check_preload(environment)
    _check_elf(target)
    return target


def _find(name: str, environment: Mapping[str, str]) -> str:
    if "/" not in name:
        found = shutil.which(name, path=environment.get("PATH", os.defpath))
        if found is None:
            raise TargetError(f"there is no command {name!r}", hint="give the path of a program, or check PATH")
        return found
    if not os.path.exists(name):
        raise TargetError(f"{name!r} does not exist")
    if os.path.isdir(name):
        raise TargetError(f"{name!r} is a folder, not a program")
    if not os.access(name, os.X_OK):
        raise TargetError(f"{name!r} is not executable", hint=f"chmod +x {name}, or name its interpreter before it")
    return name


def _check_preload(environment: Mapping[str, str]) -> None:
    for entry in environment.get("LD_PRELOAD", "").replace(":", " ").split():
        if sanitizer := _SANITIZERS.get(_library_name(entry)):
            raise TargetError(
                f"LD_PRELOAD names {sanitizer}, which must be the first library", hint="run it without that sanitizer"
            )


def _library_name(path: str) -> str:
    return Path(path).name.partition(".so")[0]


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError as error:
        raise TargetError(
            f"{path!r} cannot be read ({error.strerror})", hint="heapledger looks at a program before it starts it"
        ) from None


def _program_of(path: str, environment: Mapping[str, str]) -> tuple[str, bool]:
    """(the ELF file that will run, whether `path` is a script)."""
    program, script = path, False
    for _ in range(_MAX_SCRIPT_DEPTH):
        head = _head(program)
        if not head.startswith(b"#!"):
            break
        program, script = _interpreter(program, head, environment), True
    if not _head(program).startswith(b"\x7fELF"):
        hint = "a script needs a first line such as #!/bin/sh" if _is_text(_head(program)) else ""
        raise TargetError(f"{program!r} is not a program: neither ELF nor a script with #!", hint=hint)
    return program, script


def _is_text(head: bytes) -> bool:
    return bool(head) and b"\0" not in head


def _interpreter(path: str, head: bytes, environment: Mapping[str, str]) -> str:
    """What runs a script, following `/usr/bin/env NAME`."""
    words = head[2:].split(b"\n")[0].decode(errors="replace").split()
    if not words:
        raise TargetError(f"{path!r} names no interpreter after #!")
    if os.path.basename(words[0]) == "env":
        names = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        found = shutil.which(names[0], path=environment.get("PATH", os.defpath)) if names else None
        if found:
            return found
    if not os.path.exists(words[0]):
        raise TargetError(f"{path!r} needs {words[0]!r}, which does not exist", hint="mend its first line (#!)")
    return words[0]


def _check_identity(program: str, *, refused: bool, warnings: list[str]) -> None:
    """The loader ignores LD_PRELOAD where starting a program changes who it runs as."""
    info = os.stat(program)
    reason = ""
    if info.st_mode & stat.S_ISUID and info.st_uid != os.getuid():
        reason = f"{program!r} is setuid: it would run as user {info.st_uid}"
    elif info.st_mode & stat.S_ISGID and info.st_mode & stat.S_IXGRP and info.st_gid != os.getgid():
        reason = f"{program!r} is setgid: it would run as group {info.st_gid}"
    elif os.getuid() != 0 and _has_capabilities(program):
        reason = f"{program!r} has file capabilities"
    elif os.getuid() != os.geteuid():
        reason = "heapledger itself runs setuid"
    if not reason:
        return
    if refused:
        raise TargetError(
            f"{reason}; the loader then ignores LD_PRELOAD", hint="trace it as that user, or trace a copy without it"
        )
    warnings.append(f"{reason}: it will not be traced")


def _has_capabilities(program: str) -> bool:
    try:
        return bool(os.getxattr(program, "security.capability"))
    except OSError:
        return False


def _refuse(target: Target, reason: str, hint: str) -> NoReturn:
    what = f"{target.path!r} is run by {target.program!r}, which" if target.script else f"{target.program!r}"
    raise TargetError(f"{what} {reason}", hint=hint)


def _check_elf(target: Target) -> None:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    damage = (ELFError, ValueError, KeyError, IndexError, AttributeError, OSError, AssertionError)
    with open(target.program, "rb") as file:
        try:
            elf = ELFFile(file)
            _check_machine(target, elf)
            interpreter = _segment_interpreter(elf)
            needed = _needed(elf)
        except damage:
            _refuse(target, "is a damaged ELF file", "build or install it again")
        _check_loader(target, interpreter)
        _check_libraries(target, needed)
        try:
            own = _defines(elf, b"malloc") and _defines(elf, b"free")
        except damage:
            own = False
    if own:
        target.warnings.append(
            f"{target.program} has its own malloc: what it allocates there is not seen, only its system calls"
        )


def _check_machine(target: Target, elf: Any) -> None:
    machine = elf.header.e_machine
    if elf.elfclass != 64 or machine != "EM_X86_64":
        kind = _MACHINES.get(machine) or ("32-bit x86" if elf.elfclass == 32 else f"another machine ({machine})")
        _refuse(target, f"is a program for {kind}", "only x86-64 programs can be traced so far")
    if elf.header.e_type not in ("ET_EXEC", "ET_DYN"):
        _refuse(target, "is not a linked program", "link it first")


def _segment_interpreter(elf: Any) -> str:
    for segment in elf.iter_segments():
        if segment.header.p_type == "PT_INTERP":
            return str(segment.get_interp_name())
    return ""


def _needed(elf: Any) -> list[str]:
    for segment in elf.iter_segments():
        if segment.header.p_type == "PT_DYNAMIC":
            return [str(tag.needed) for tag in segment.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
    return []


def _check_loader(target: Target, interpreter: str) -> None:
    if not interpreter:
        _refuse(
            target, "is statically linked: nothing can be preloaded into it", "link it dynamically (without -static)"
        )
    if "musl" in interpreter:
        _refuse(target, "uses musl, not glibc", "build it on a glibc system; musl cannot be traced so far")
    if not os.path.exists(interpreter):
        _refuse(target, f"needs the loader {interpreter!r}, which does not exist", "install that libc")


def _check_libraries(target: Target, needed: list[str]) -> None:
    for library in needed:
        name = _library_name(library)
        if name in _SANITIZERS:
            _refuse(
                target,
                f"was built with {_SANITIZERS[name]}, which must be the first library",
                "build it without -fsanitize, or use the sanitizer's own reports",
            )
        if name.startswith(_ALLOCATORS):
            target.warnings.append(f"{target.program} uses {library}: calls are recorded, glibc's model does not apply")


def _defines(elf: Any, name: bytes) -> bool:
    """Whether a function `name` is defined in the file, exported or not. Looks the name up, then its offset: the
    symbol tables of large programs have 10**5 entries."""
    for section in elf.iter_sections():
        if section.header.sh_type not in ("SHT_DYNSYM", "SHT_SYMTAB") or section.header.sh_size > _MAX_SYMTAB:
            continue
        at = elf.get_section(section.header.sh_link).data().find(b"\0" + name + b"\0") + 1
        if at and _names_function(section.data(), struct.pack("<I", at)):
            return True
    return False


def _names_function(symbols: bytes, offset: bytes) -> bool:
    """Whether one of the `symbols` with this st_name is a function that is defined here."""
    place = symbols.find(offset)
    while place >= 0:
        if place % _SYMBOL.size == 0 and place + _SYMBOL.size <= len(symbols):
            _, info, _, section, _, _ = _SYMBOL.unpack_from(symbols, place)
            if info & 0xF == _STT_FUNC and section != 0:
                return True
        place = symbols.find(offset, place + 1)
    return False

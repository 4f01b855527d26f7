"""Rust symbol names, both schemes.

legacy    _ZN4core3fmt9Formatter3pad17h0123456789abcdefE   C++'s nested name, escapes `$LT$` and `..`, a hash at the end
v0        _RNvCs1234_7mycrate3foo                          https://doc.rust-lang.org/rustc/symbol-mangling/v0.html

The hash and the crates' disambiguators are left out, as in `addr2line -C`. Output is bounded: back references can make
a short name describe an exponentially long one.
"""

from __future__ import annotations

import re

LIMIT_OUTPUT = 65_536
LIMIT_DEPTH = 200
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEGACY = re.compile(r"_ZN((?:\d+.+)?)17h[0-9a-f]{16}E(?:\..*)?\Z", re.ASCII)
ESCAPES = {
    "$SP$": "@", "$BP$": "*", "$RF$": "&", "$LT$": "<", "$GT$": ">", "$LP$": "(", "$RP$": ")", "$C$": ",",
}  # fmt: skip
BASIC_TYPES = {
    "a": "i8", "b": "bool", "c": "char", "d": "f64", "e": "str", "f": "f32", "h": "u8", "i": "isize", "j": "usize",
    "l": "i32", "m": "u32", "n": "i128", "o": "u128", "p": "_", "s": "i16", "t": "u16", "u": "()", "v": "...",
    "x": "i64", "y": "u64", "z": "!",
}  # fmt: skip
SIGNED = "aslxni"


def demangle_rust(name: str) -> str | None:
    """The name as Rust writes it; None where it is not a Rust name.

    >>> demangle_rust("_ZN4core3fmt9Formatter3pad17h0123456789abcdefE")
    'core::fmt::Formatter::pad'
    >>> demangle_rust("_RNvCs1234_7mycrate3foo")
    'mycrate::foo'
    """
    if name.startswith("_R"):
        try:
            return _V0(name.partition(".")[0][2:]).symbol()
        except _NotRustError:
            return None
    found = LEGACY.match(name)
    return _legacy(found.group(1)) if found else None


def _legacy(path: str) -> str | None:
    parts = []
    at = 0
    while at < len(path):
        start = at
        while at < len(path) and path[at] in "0123456789":
            at += 1
        if at == start or at - start > 6:
            return None
        end = at + int(path[start:at])
        if end > len(path):
            return None
        parts.append(_unescape(path[at:end]))
        at = end
    return "::".join(parts) or None


def _unescape(part: str) -> str:
    """`_$LT$impl$u20$Foo$GT$..bar` is `<impl Foo>::bar`."""
    if part.startswith("_$"):
        part = part[1:]

    def escape(found: re.Match[str]) -> str:
        text = found.group(0)
        if text in ESCAPES:
            return ESCAPES[text]
        code = int(found.group(1), 16) if found.group(1) else -1
        return chr(code) if 0x20 <= code < 0xD800 else text

    return re.sub(r"\$(?:u([0-9a-f]{1,6})|[A-Z]{1,2})\$", escape, part).replace("..", "::")


class _NotRustError(Exception):
    """The name does not follow the grammar."""


class _V0:
    """A recursive-descent reader of the v0 grammar: one method a production, each returning its text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.written = 0
        self.lifetimes = 0

    def symbol(self) -> str:
        """The path; an instantiating crate's path may follow, which is not shown."""
        if self.text[:1].isdigit():
            raise _NotRustError
        return self.path(True)

    # Characters and numbers

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        letter = self.peek()
        if not letter:
            raise _NotRustError
        self.at += 1
        return letter

    def accept(self, letter: str) -> bool:
        if self.peek() != letter:
            return False
        self.at += 1
        return True

    def enter(self) -> None:
        self.depth += 1
        if self.depth > LIMIT_DEPTH:
            raise _NotRustError

    def shown(self, text: str) -> str:
        """Count what has been produced: nested back references double it at every level."""
        self.written += len(text)
        if self.written > 16 * LIMIT_OUTPUT or len(text) > LIMIT_OUTPUT:
            raise _NotRustError
        return text

    def base62(self) -> int:
        """`_` is 0, `0_` is 1, and so on."""
        if self.accept("_"):
            return 0
        value = 0
        while not self.accept("_"):
            digit = DIGITS.find(self.take())
            if digit < 0 or value > 1 << 64:
                raise _NotRustError
            value = value * 62 + digit
        return value + 1

    def optional_base62(self, letter: str) -> int:
        return self.base62() + 1 if self.accept(letter) else 0

    def identifier(self) -> tuple[str, int]:
        """(name, disambiguator): `s` base62, then an optional `u` for Punycode, length, an optional `_`, the bytes."""
        disambiguator = self.optional_base62("s")
        punycode = self.accept("u")
        start = self.at
        if not self.accept("0"):
            while self.peek() in tuple("0123456789"):
                self.at += 1
        if start == self.at or self.at - start > 6:
            raise _NotRustError
        length = int(self.text[start : self.at])
        self.accept("_")
        name = self.text[self.at : self.at + length]
        if len(name) != length:
            raise _NotRustError
        self.at += length
        return (_punycode(name) if punycode else name), disambiguator

    def back_reference(self) -> int:
        """The position a `B` points at, which must lie before it."""
        start = self.at - 1
        target = self.base62()
        if target >= start:
            raise _NotRustError
        return target

    # Productions

    def path(self, in_value: bool) -> str:
        self.enter()
        text = self.shown(self._path(in_value))
        self.depth -= 1
        return text

    def _path(self, in_value: bool) -> str:
        kind = self.take()
        if kind == "C":
            return self.identifier()[0]
        if kind == "N":
            return self.nested(in_value)
        if kind in "MX":
            self.optional_base62("s")
            self.path(False)
            kind = "M" if kind == "M" else "Y"
        if kind == "M":
            return f"<{self.type()}>"
        if kind == "Y":
            return f"<{self.type()} as {self.path(False)}>"
        if kind == "I":
            inner = self.path(in_value)
            arguments = self.until_end(self.generic)
            return f"{inner}{'::' if in_value else ''}<{', '.join(arguments)}>"
        if kind == "B":
            return self.again(lambda: self.path(in_value))
        raise _NotRustError

    def nested(self, in_value: bool) -> str:
        """`N` namespace path identifier: a lower-case namespace is an ordinary name, `C` a closure, `S` a shim."""
        space = self.take()
        inner = self.path(in_value)
        name, number = self.identifier()
        if space.islower():
            return f"{inner}::{name}" if name else inner
        label = {"C": "closure", "S": "shim"}.get(space, space)
        return f"{inner}::{{{label}{':' + name if name else ''}#{number}}}"

    def generic(self) -> str:
        if self.accept("L"):
            return self.lifetime(self.base62())
        if self.accept("K"):
            return self.constant()
        return self.type()

    def until_end(self, production: object) -> list[str]:
        """Productions up to `E`."""
        assert callable(production)
        found = []
        while not self.accept("E"):
            found.append(production())
            self.shown(found[-1])
        return found

    def again(self, production: object) -> str:
        """A production read once more at the place a back reference names."""
        assert callable(production)
        target = self.back_reference()
        after = self.at
        self.at = target
        text = str(production())
        self.at = after
        return text

    def lifetime(self, index: int) -> str:
        """0 is erased; others count back from the innermost binder."""
        if index == 0:
            return "'_"
        number = self.lifetimes - index
        if number < 0:
            raise _NotRustError
        return f"'{chr(97 + number)}" if number < 26 else f"'_{number}"

    def binder(self) -> str:
        """`for<'a, 'b> `, and its lifetimes in force until the caller takes them back."""
        count = self.optional_base62("G")
        if count > 64:
            raise _NotRustError
        self.lifetimes += count
        names = [self.lifetime(count - k) for k in range(count)]
        return f"for<{', '.join(names)}> " if names else ""

    def type(self) -> str:
        self.enter()
        text = self.shown(self._type())
        self.depth -= 1
        return text

    def _type(self) -> str:
        kind = self.take()
        if kind in BASIC_TYPES:
            return BASIC_TYPES[kind]
        if kind == "A":
            return f"[{self.type()}; {self.constant()}]"
        if kind == "S":
            return f"[{self.type()}]"
        if kind == "T":
            parts = self.until_end(self.type)
            return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
        if kind in "RQ":
            return self.reference("mut " if kind == "Q" else "")
        if kind in "PO":
            return f"*{'const' if kind == 'P' else 'mut'} {self.type()}"
        if kind == "F":
            return self.function()
        if kind == "D":
            return self.dynamic()
        if kind == "B":
            return self.again(self.type)
        self.at -= 1
        return self.path(False)

    def reference(self, mutable: str) -> str:
        lifetime = ""
        if self.accept("L"):
            index = self.base62()
            lifetime = f"{self.lifetime(index)} " if index else ""
        return f"&{lifetime}{mutable}{self.type()}"

    def function(self) -> str:
        before = self.lifetimes
        text = self.binder()
        if self.accept("U"):
            text += "unsafe "
        if self.accept("K"):
            abi = "C" if self.accept("C") else self.identifier()[0].replace("_", "-")
            text += f'extern "{abi}" '
        text += f"fn({', '.join(self.until_end(self.type))})"
        if not self.accept("u"):
            text += f" -> {self.type()}"
        self.lifetimes = before
        return text

    def dynamic(self) -> str:
        before = self.lifetimes
        binder = self.binder()
        bounds = self.until_end(self.trait)
        self.lifetimes = before
        if not self.accept("L"):
            raise _NotRustError
        index = self.base62()
        return f"dyn {binder}{' + '.join(bounds)}" + (f" + {self.lifetime(index)}" if index else "")

    def trait(self) -> str:
        """A path, with the associated types that `p` gives put into its angle brackets."""
        text = self.path(False)
        bindings = []
        while self.accept("p"):
            name, _ = self.identifier()
            bindings.append(f"{name} = {self.type()}")
        if not bindings:
            return text
        inside = ", ".join(bindings)
        return f"{text[:-1]}, {inside}>" if text.endswith(">") else f"{text}<{inside}>"

    def constant(self) -> str:
        self.enter()
        text = self.shown(self._constant())
        self.depth -= 1
        return text

    def _constant(self) -> str:
        kind = self.take()
        if kind == "B":
            return self.again(self.constant)
        if kind == "p":
            return "_"
        if kind not in SIGNED + "hmtyojbc":
            raise _NotRustError
        sign = "-" if kind in SIGNED and self.accept("n") else ""
        start = self.at
        while self.take() != "_":
            pass
        digits = self.text[start : self.at - 1]
        if digits and (len(digits) > 32 or any(d not in "0123456789abcdef" for d in digits)):
            raise _NotRustError
        value = int(digits or "0", 16)
        if kind == "b":
            return "true" if value else "false"
        if kind == "c":
            return repr(chr(value)) if value < 0x110000 else "_"
        return f"{sign}{value}" if value < 1 << 64 else f"{sign}0x{digits}"


def _punycode(name: str) -> str:
    """Rust's Punycode has `_` for the last `-`."""
    head, separator, tail = name.rpartition("_")
    try:
        return (f"{head}-{tail}" if separator else tail).encode("ascii").decode("punycode")
    except UnicodeError:
        return name

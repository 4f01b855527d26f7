"""Every error heapledger raises on purpose, in one tree.

HeapledgerError            exit 1   our own fault, or a failure nothing else describes
├── UsageError             exit 2   the request cannot be carried out as it was made
│   ├── TargetError        exit 2   this program cannot be traced (static, setuid, wrong architecture, musl ...)
│   ├── InputError         exit 2   an input file cannot be read
│   │   ├── TraceError     exit 2   not a trace file, or damaged beyond use
│   │   ├── SchemaError    exit 2   a trace file of a version this heapledger does not read
│   │   ├── SpoolError     exit 2   a spool folder that cannot be recovered
│   │   └── MtraceError    exit 2   a glibc mtrace log that cannot be imported (carries the line number)
│   └── ProcessGoneError   exit 2   the process ended, or may not be looked at
├── GateFailure            exit 3   a regression, or leaks with --fail-on-leak
└── NotMeasuredError       exit 4   not comparable, or not measured: never a pass

Each message is one line that says what is wrong; `hint` says what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class HeapledgerError(Exception):
    """Base of all deliberate errors. `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HeapledgerError):
    exit_code: ClassVar[int] = 2


class TargetError(UsageError):
    """The program to trace cannot be traced; the message says why."""


class InputError(UsageError):
    """An input file cannot be read."""


class TraceError(InputError):
    """Not a trace file, or one that is damaged beyond use."""


class SchemaError(InputError):
    """A trace file of a schema version that this heapledger does not read."""


class SpoolError(InputError):
    """A spool folder that cannot be recovered."""


class MtraceError(InputError):
    """A glibc mtrace log that cannot be imported."""

    def __init__(self, message: str, *, line: int = 0, hint: str = "") -> None:
        super().__init__(f"line {line}: {message}" if line else message, hint=hint)
        self.line = line


class ProcessGoneError(UsageError):
    """The process ended, or the kernel does not let us look at it."""


class GateFailure(HeapledgerError):  # noqa: N818  (a verdict, not a fault)
    exit_code: ClassVar[int] = 3


class NotMeasuredError(HeapledgerError):
    exit_code: ClassVar[int] = 4

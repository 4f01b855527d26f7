"""How far the model can be believed: its predictions against what was observed in the same trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heapledger.web.units import visible

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Check:
    """A line of the agreement table. `share` None: nothing was compared, which is not the same as right."""

    id: str
    label: str
    compared: int
    exact: int
    share: float | None
    remark: str

    @property
    def is_exact(self) -> bool:
        return self.share == 1


@dataclass(frozen=True, slots=True)
class AgreementView:
    checks: tuple[Check, ...]
    glibc: str
    verdict: str
    is_exact: bool
    reasons: tuple[tuple[str, int], ...]
    kernel_bytes: int | None
    ledger_bytes: int | None
    lost: int
    events: int


def check(label_id: str, label: str, compared: int, exact: int, remark: str = "") -> Check:
    return Check(label_id, label, compared, exact, exact / compared if compared else None, remark)


def address_remark(addresses: Json) -> str:
    parts = [f"{addresses[name]:,} {name}" for name in ("reordered", "forced") if addresses[name]]
    return ", ".join(parts)


def reason_lines(reasons: Json) -> tuple[tuple[str, int], ...]:
    """`OTHER_ARENA` → `other arena`, the most frequent first."""
    counted = sorted(((count, name) for name, count in reasons.items() if count), reverse=True)
    return tuple((visible(name).lower().replace("_", " "), count) for count, name in counted)


def own_part(verify: Json, process_id: int) -> Json:
    """What `verify` says of one process: it sums over all of them."""
    return next((part for part in verify.get("processes") or () if part.get("id") == process_id), verify)


def agreement_view(verify: Json, process_id: int) -> AgreementView:
    part = own_part(verify, process_id)
    addresses, maps, rss = part["addresses"], part["maps"], part["rss"]
    syscalls = part.get("syscalls") or {}
    checks = (
        check(
            "addresses",
            "Addresses malloc returned",
            addresses["predicted"],
            addresses["exact"],
            address_remark(addresses),
        ),
        check("maps", "Heap and large blocks against the kernel's maps", maps["compared"], maps["exact"]),
        check(
            "syscalls",
            "System calls malloc makes",
            syscalls.get("compared") or 0,
            syscalls.get("exact") or 0,
            f"{syscalls.get('predicted') or 0:,} predicted, not recorded yet",
        ),
    )
    predicted, exact = addresses["predicted"], addresses["exact"]
    if part.get("sampled"):
        verdict = "Not measured: this trace is a sample, from which no address can be predicted."
    elif predicted == 0:
        verdict = "No address was predicted: nothing is known about the model's agreement."
    elif predicted == exact:
        verdict = f"All {predicted:,} addresses were predicted exactly."
    else:
        verdict = f"{exact:,} of {predicted:,} addresses were predicted exactly."
    return AgreementView(
        checks=checks,
        glibc=visible(str(part.get("glibc") or verify.get("glibc") or "not known")),
        verdict=verdict,
        is_exact=predicted > 0 and predicted == exact,
        reasons=reason_lines(part.get("reasons") or {}),
        kernel_bytes=rss["kernel_bytes"] if rss.get("snapshots") else None,
        ledger_bytes=rss["ledger_bytes"] if rss.get("snapshots") else None,
        lost=part["lost"],
        events=part["events"],
    )

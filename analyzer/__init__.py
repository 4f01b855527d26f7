"""Makes sense of a trace: replays its events through the models and books every resident page to an owner.

    events ──▶ replay (glibc/) ──▶ session ──┬─▶ ledger, owners (kernel/) ─┐
    snapshots ───────────────────────────────┘   holes · leaks/ · timeline ├─▶ facts (in the trace file) ──▶ reports/
                                                                           ┘
A model is a pure function of events and settings. Nothing here imports heapledger.tracer.
"""

"""Which micro-batches of an optimizer step a process computes."""

from dataclasses import replace
from typing import Any

import torch

from ..batches import Packed, Schedule, balance, cut
from ..data.rows import Row
from ..engine import Engine


class Feed:
    """step (0-based) -> this process's micro-batches, each of at most `n_tokens` tokens, or one row.

    Args:
        processes: a `Processes`; its index and world size decide which rows are this process's.
    """

    def __init__(self, schedule: Schedule, engine: Engine, processes: Any, n_tokens: int):
        self.schedule, self.engine, self.processes, self.n_tokens = schedule, engine, processes, n_tokens
        self._ready: dict[int, tuple[list[Packed], int, int]] = {}

    def __getitem__(self, step: int) -> tuple[list[Packed], int, int]:
        """(micro-batches, supervised tokens, tokens): the last two are of all processes. Two steps are remembered."""
        if step not in self._ready:
            rows = self.schedule[step]
            lengths = [len(r) for r in rows]
            cuts = [  # for each process: its micro-batches, as indices into the step's rows
                [[mine[j] for j in part] for part in cut([lengths[i] for i in mine], self.n_tokens)]
                for mine in balance(lengths, self.processes.world_size)
            ]
            make = self._equally_many if self.processes.sharded else self._own
            self._ready = {s: ready for s, ready in self._ready.items() if s == step - 1}
            self._ready[step] = make(rows, cuts), sum(r.n_supervised for r in rows), sum(lengths)
        return self._ready[step]

    def _own(self, rows: list[Row], cuts: list[list[list[int]]]) -> list[Packed]:
        n_rows = self.schedule.rows_per_step
        return [self.engine.pack([rows[i] for i in part], part, n_rows) for part in cuts[self.processes.index]]

    def _equally_many(self, rows: list[Row], cuts: list[list[list[int]]]) -> list[Packed]:
        """With a sharded base all processes gather each layer together, so all compute as many micro-batches, padded
        to as many supervised positions. A process that has no row left computes one without losses."""
        batches = []
        for k in range(max(map(len, cuts))):
            parts = [part[k] if k < len(part) else [] for part in cuts]
            supervised = max(sum(rows[i].n_supervised for i in part) for part in parts)
            spare = rows[next(part for part in parts if part)[0]]
            mine = parts[self.processes.index]
            chosen = [rows[i] for i in mine] or [replace(spare, supervised=torch.zeros_like(spare.supervised))]
            batches.append(self.engine.pack(chosen, mine or None, n_supervised=supervised))
        return batches

    def halve(self) -> None:
        """Make micro-batches half as large from now on; a row is never cut."""
        self.n_tokens = max(1, self.n_tokens // 2)
        self.forget()

    def forget(self) -> None:
        """Give back the memory of the batches that are remembered."""
        self._ready.clear()

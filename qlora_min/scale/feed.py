"""The micro-batches of each optimizer step that a process computes."""

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from ..batches import Packed, Schedule, balance, cut
from ..data.rows import Row
from ..engine import Engine


class Feed:
    """Maps a step (0-based) to this process's micro-batches, each of at most max(`n_tokens`, longest row) tokens.

    Args:
        processes: a `Processes`; its index and world size decide which rows this process computes.
    """

    def __init__(self, schedule: Schedule, engine: Engine, processes: Any, n_tokens: int):
        self.schedule, self.engine, self.processes, self.n_tokens = schedule, engine, processes, n_tokens
        self._ready: dict[int, tuple[list[Packed], int, int]] = {}

    def __getitem__(self, step: int) -> tuple[list[Packed], int, int]:
        """(this process's micro-batches, supervised tokens, tokens), both numbers summed over all processes.

        The last two steps are cached.
        """
        if step not in self._ready:
            rows = self.schedule[step]
            lengths = [len(r) for r in rows]
            cuts = [  # for each process: its micro-batches, as indices into the step's rows
                [[mine[j] for j in part] for part in cut([lengths[i] for i in mine], self.n_tokens)]
                for mine in balance(lengths, self.processes.world_size)
            ]
            self._ready = {s: ready for s, ready in self._ready.items() if s == step - 1}
            self._ready[step] = self._pack(rows, cuts), sum(r.n_supervised for r in rows), sum(lengths)
        return self._ready[step]

    def _pack(self, rows: list[Row], cuts: list[list[list[int]]]) -> list[Packed]:
        """This process's micro-batches.

        With a sharded base every layer is gathered by all processes together, so all of them compute the same number
        of micro-batches, padded to the same number of supervised positions. A process that has no rows left computes
        a row of another process with all its losses masked.
        """
        index, n_rows = self.processes.index, self.schedule.rows_per_step
        if not self.processes.sharded:
            return [self.engine.pack([rows[i] for i in part], part, n_rows) for part in cuts[index]]
        batches = []
        for parts in zip_longest(*cuts, fillvalue=[]):
            mine, spare = parts[index], rows[next(filter(None, parts))[0]]
            supervised = max(sum(rows[i].n_supervised for i in part) for part in parts)
            chosen = [rows[i] for i in mine] or [replace(spare, supervised=torch.zeros_like(spare.supervised))]
            batches.append(self.engine.pack(chosen, mine or None, n_supervised=supervised))
        return batches

    def halve(self) -> None:
        """Halve the size of micro-batches from now on; a row is never split."""
        self.n_tokens = max(1, self.n_tokens // 2)
        self.forget()

    def forget(self) -> None:
        """Release the cached batches."""
        self._ready.clear()

"""Encoded rows in memory-mapped Arrow files."""

import itertools
import json
import mmap
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # comes with datasets
import torch

from ..system.text import refusing
from .examples import Example
from .layouts import to_example

Choices = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True)
class Row:
    """One encoded row of T tokens.

    Attributes:
        input_ids, supervised: (T,) int32 and bool; the supervised tokens count in the loss.
        location: the file and line it was read from.
        choices: the first token of each option, the index of the right one, and the position of the token that chooses;
            None if it is not multiple choice.
        text: `Example.as_row` as JSON if `encode_dataset` was to keep them, otherwise "".
    """

    input_ids: torch.Tensor
    supervised: torch.Tensor
    location: str
    choices: Choices | None = None
    text: str = ""

    @property
    def example(self) -> Example:
        """The row before it was encoded; only for rows with `text`."""
        return to_example(json.loads(self.text), self.location)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_supervised(self) -> int:
        """The number of supervised tokens, without the first of the row, which is not predicted."""
        return int(np.count_nonzero(self.supervised.numpy()[1:]))

    @property
    def answer_start(self) -> int:
        """The index of the first token of the last answer."""
        begins = self.supervised & ~self.supervised.roll(1)
        return int(begins.nonzero()[-1])


INTEGERS, FLAGS, BYTES = pa.list_(pa.int32()), pa.list_(pa.uint8()), pa.binary()
SCHEMA = pa.schema({"input_ids": INTEGERS, "supervised": FLAGS, "location": BYTES, "choices": INTEGERS, "text": BYTES})
ROWS_A_BATCH = 1024


def _columns_of(row: Row) -> tuple[Any, ...]:
    """The values of SCHEMA. choices: first tokens of the options, then the two other numbers; or empty."""
    return (
        row.input_ids.numpy(),
        row.supervised.numpy().view(np.uint8),
        row.location.encode("utf-8", "surrogateescape"),
        (*row.choices[0], *row.choices[1:]) if row.choices else (),
        row.text.encode("utf-8"),
    )


class Rows(Sequence[Row]):
    """Rows in memory-mapped Arrow files, the format of `datasets`. `rows[i]` reads a row, which takes about 10 us.

    A slice, a mask (n,) or an array of indices gives Rows on the same files.

    Attributes:
        lengths, supervised: (n,) int32, in memory. The numbers of tokens and of supervised tokens of each row.
    """

    def __init__(self, table: pa.Table, index: np.ndarray, lengths: np.ndarray, supervised: np.ndarray):
        self._table, self._index, self.lengths, self.supervised = table, index, lengths, supervised
        self._columns = table.columns

    @classmethod
    def write(cls, rows: Iterable[Row]) -> "Rows":
        """Write rows to a new file in the folder for temporary files ($TMPDIR).

        On Linux the file has no name and is deleted with the process, even if that is killed.

        Raises:
            ValueError: the file can't be written, for example because the disk is full.
        """
        lengths, supervised, rows = array("i"), array("i"), iter(rows)
        full = f"the encoded rows can't be written to {tempfile.gettempdir()}"
        with (
            refusing(full, "set TMPDIR to a folder with space, about 5 bytes a token", OSError),
            tempfile.TemporaryFile(prefix="qlora_min-") as file,
        ):
            with pa.ipc.new_stream(file, SCHEMA) as writer:
                while part := list(itertools.islice(rows, ROWS_A_BATCH)):
                    columns = list(zip(*map(_columns_of, part)))
                    writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
                    lengths.extend(map(len, part))
                    supervised.extend(r.n_supervised for r in part)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # keeps the file open
        table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
        if hasattr(mmap, "MADV_DONTNEED"):  # free the pages that opening has read, at least one of each batch
            mapped.madvise(mmap.MADV_DONTNEED)
        return cls(table, np.arange(len(lengths)), np.array(lengths, np.int32), np.array(supervised, np.int32))

    @classmethod
    def join(cls, parts: Iterable["Rows"]) -> "Rows":
        """The rows of all parts, in order. Only the arrays in memory are copied."""
        parts = list(parts) or [cls.write(())]
        starts = itertools.accumulate((len(p._table) for p in parts), initial=0)
        return cls(
            pa.concat_tables(p._table for p in parts),
            np.concatenate([p._index + start for p, start in zip(parts, starts)]),
            np.concatenate([p.lengths for p in parts]),
            np.concatenate([p.supervised for p in parts]),
        )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i):
        if isinstance(i, slice | np.ndarray):
            return Rows(self._table, self._index[i], self.lengths[i], self.supervised[i])
        at = int(self._index[i])
        input_ids, supervised, location, choices, text = (column[at] for column in self._columns)
        *letters, correct, position = choices.as_py() or [None, None]
        return Row(
            torch.from_numpy(input_ids.values.to_numpy().copy()),
            torch.from_numpy(supervised.values.to_numpy().astype(bool)),
            location.as_py().decode("utf-8", "surrogateescape"),
            (tuple(letters), correct, position) if letters else None,
            text.as_py().decode("utf-8"),
        )

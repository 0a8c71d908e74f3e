"""The endless batches of a run: drawn in order, prepared by workers, bad rows left out, put together here.

Workers only prepare single rows; which rows make a batch is decided in this process in the order of the draws. So the
batches are the same whatever the number of workers, and a run goes on at the exact sample where it stopped.


Prepared rows on their way from a worker process, the tensors of all of them in one piece.

Each tensor that comes from another process keeps a file open as long as it is alive, and a process may have 1,024 of
them in most places; rows that are kept back for packing alone would have more.

"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flamingo_ft.data.collate import pack

from .examples import DataStats, Example, SkippedRow
from .order import SampleIndex, SampleOrder, group_by_length

REMEMBERED = 1024  # batches, of which it is told what is in them
WINDOW = 50  # batches among whose samples those of like length are put together

Placed = tuple[int, Example]  # a sample that trains, and its place in the order
Fill = Callable[[Iterator[Placed]], Iterator[list[list[Placed]]]]


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are loaded.

    batch_size: rows of text in a batch. workers: processes that prepare them; 0: this one does.
    rank, world_size: this process takes every ``world_size``-th ``batch_size`` draws, from the ``rank``-th on.
    """

    batch_size: int
    workers: int = 0
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class BatchContents:
    """What is in a batch. rows: where each of its samples, or pairs, is; label_tokens: tokens that are learned, of pairs
    those of both answers; images: of each sample or pair."""

    rows: tuple[str, ...]
    label_tokens: int
    images: int


class Batches:
    """Iterate over it for batches, without an end; `state_dict` tells where the last one given out ends.

    contents: of the last batches given out, oldest first, until somebody takes them away.

    prepare: from a draw to what it gives, in the workers. fill: from samples that train to the rows of one batch after
    another, each of one sample or several; it may keep some back for later ones, as long as it would place those in the
    same way without the ones given out. assemble: from a batch's rows to its tensors.
    """

    def __init__(
        self,
        order: Callable[[int], Iterator[SampleIndex]],
        prepare: Dataset,
        fill: Fill,
        assemble: Callable[[list[list[Example]]], dict[str, torch.Tensor]],
        stats: DataStats,
        loading: LoaderConfig,
    ):
        self.order, self.prepare, self.fill, self.assemble = order, prepare, fill, assemble
        self.stats, self.loading = stats, loading
        self.contents: deque[BatchContents] = deque(maxlen=REMEMBERED)
        self._next: int = 0
        self._waiting: list[int] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for rows in self.fill(self._samples_that_train()):
            given = {place for row in rows for place, _ in row}
            self._waiting = [place for place in self._waiting if place not in given]
            self.contents.append(_contents(prepared for row in rows for _, prepared in row))
            yield self.assemble([[prepared for _, prepared in row] for row in rows])

    @property
    def epoch(self) -> float | None:
        """How often the training data were gone through so far; None where a source is streamed."""
        length = self.stats.epoch_length
        return None if length is None else round(self._next / length, 4)

    def state_dict(self) -> dict[str, Any]:
        """The next draw, those that were drawn before it and kept back, and the counts so far."""
        return {"next": self._next, "waiting": list(self._waiting), "tally": self.stats.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were given out before `state_dict`."""
        self._next, self._waiting = state["next"], list(state["waiting"])
        self.stats.load_state_dict(state["tally"])

    def _samples_that_train(self) -> Iterator[Placed]:
        """From where the state stands: first those that were kept back, which are counted already."""
        start, kept_back = self._next, {*self._waiting}
        for place, result in self._results(min([start, *kept_back]), kept_back, start):
            if place >= start:
                self._next = place + 1
                self._count(result)
            if isinstance(result, Example):
                self._waiting += [place] if place >= start else []
                yield place, result

    def _count(self, result: Example | SkippedRow) -> None:
        if isinstance(result, SkippedRow):
            self.stats.count_skipped(result)
        else:
            self.stats.count_used(result.encoded.cut, result.encoded.rewritten)

    def _results(
        self, begin: int, kept_back: set[int], start: int
    ) -> Iterator[tuple[int, Example | SkippedRow]]:
        """What this process's draws from place ``begin`` on give, but those between that were given out already."""
        wanted = (
            (place, draw)
            for place, draw in enumerate(self.order(begin), start=begin)
            if (place >= start or place in kept_back) and self._is_mine(place)
        )
        for placed in self._prepared(wanted):
            yield from placed

    def _is_mine(self, place: int) -> bool:
        return place // self.loading.batch_size % self.loading.world_size == self.loading.rank

    def _prepared(
        self, draws: Iterator[tuple[int, SampleIndex]]
    ) -> Iterable[list[tuple[int, Example | SkippedRow]]]:
        """The draws prepared, in their order, as many at a time as a batch has rows."""
        batches = iter(lambda: list(itertools.islice(draws, self.loading.batch_size)), [])
        loader = DataLoader(
            _Placing(self.prepare),
            batch_sampler=batches,
            num_workers=self.loading.workers,
            collate_fn=wrap if self.loading.workers else list,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # one of its own, so that loading leaves torch's random numbers alone
        )
        return map(unwrap, loader) if self.loading.workers else loader


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and a batch system's or systemd's SIGTERM every one of a job; the main
    process decides, and still wants its batches until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_main_process_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_main_process_says(main_process: int) -> None:
    """Wait for the SIGTERM by which a `DataLoader` ends its workers; those of others are passed over."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)


def _contents(samples: Iterable[Example]) -> BatchContents:
    texts = [(sample.where, sample.encoded) for sample in samples]
    labels, images = (sum(getattr(text, name) for _, text in texts) for name in ("label_tokens", "images"))
    return BatchContents(tuple(where for where, _ in texts), labels, images)


class _Placing(Dataset):
    """Keeps beside each result the place of its draw."""

    def __init__(self, prepare: Dataset):
        self.prepare = prepare

    def __getitem__(self, placed: tuple[int, SampleIndex]) -> tuple[int, Example | SkippedRow]:
        place, draw = placed
        return place, self.prepare[draw]


def one_sample_per_row(batch_size: int) -> Fill:
    """Batches of ``batch_size`` rows, a sample each, as they come."""

    def fill(samples: Iterator[Placed]) -> Iterator[list[list[Placed]]]:
        return iter(lambda: [[sample] for sample in itertools.islice(samples, batch_size)], [])

    return fill


def packed_rows(batch_size: int, row_length: int) -> Fill:
    """Batches of ``batch_size`` rows, each with as many samples as fit into ``row_length`` text tokens."""

    def fill(samples: Iterator[Placed]) -> Iterator[list[list[Placed]]]:
        rows = pack(samples, lambda placed: len(placed[1].encoded.input_ids), row_length)
        return iter(lambda: list(itertools.islice(rows, batch_size)), [])

    return fill


def sorted_by_length(
    order: SampleOrder, size_of: Callable[[SampleIndex], int], batch_size: int
) -> Callable[[int], Iterator[SampleIndex]]:
    """The order with samples of like length next to each other, to be entered at any place."""
    window = WINDOW * batch_size

    def draws(start: int) -> Iterator[SampleIndex]:
        first = start // window * window
        grouped_draws = group_by_length(order.draws(first), size_of, batch_size, window, order.seed)
        return itertools.islice(grouped_draws, start - first, None)

    return draws


@dataclass(frozen=True)
class Parcel:
    """content: pickled, with a number for each tensor; shapes: of those, with their dtype; pieces: their values, one
    after the other, for each dtype."""

    content: bytes
    shapes: list[tuple[torch.dtype, torch.Size]]
    pieces: dict[torch.dtype, Tensor]


def wrap(value: Any) -> Parcel:
    """A value with CPU tensors anywhere in it, for another process."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    flat = defaultdict(list)
    for tensor in pickler.tensors:
        flat[tensor.dtype].append(tensor.flatten())
    pieces = {dtype: torch.cat(parts) for dtype, parts in flat.items()}
    return Parcel(file.getvalue(), [(tensor.dtype, tensor.shape) for tensor in pickler.tensors], pieces)


def unwrap(parcel: Parcel) -> Any:
    """The value, its tensors in memory of this process."""
    begins, tensors = dict.fromkeys(parcel.pieces, 0), []
    for dtype, shape in parcel.shapes:
        begin, end = begins[dtype], begins[dtype] + shape.numel()
        tensors.append(parcel.pieces[dtype][begin:end].clone().view(shape))
        begins[dtype] = end
    return _Unpickler(io.BytesIO(parcel.content), tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]

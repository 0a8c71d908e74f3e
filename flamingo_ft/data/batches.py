"""The endless batches of a run, prepared by workers and put together in an order that follows from the seed.

Workers prepare single rows; this process decides which rows make a batch. So the batches are the same for
any number of workers, and a run resumes at the exact sample.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .collate import pack
from .examples import DataStats, Example, SkippedRow
from .feature_cache import FeatureCache
from .sample_order import SampleIndex, SampleOrder, group_by_length

REMEMBERED_BATCHES = 1024  # how many recent batches `Batches.contents` describes
LENGTH_WINDOW = 50  # batches whose samples are grouped by similar length together

PlacedExample = tuple[int, Example]  # with its position in the run's order
RowGrouping = Callable[[Iterator[PlacedExample]], Iterator[list[list[PlacedExample]]]]
"""Groups examples into the rows of successive batches; a row has one example, or several if they are packed.

It may hold examples back for later batches. Placing a held-back example must not depend on examples already
returned: a resumed run sees only those held back and later ones.
"""


PackedTensors = tuple[bytes, list[int], Tensor]
"""(pickle without tensor data, byte size of each tensor, concatenated tensor data (N,))"""


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are loaded.

    batch_size: rows of text in a batch. workers: processes that prepare them; 0: this one. rank, world_size:
    this process takes every ``world_size``-th group of ``batch_size`` positions, starting with the
    ``rank``-th.
    """

    batch_size: int
    workers: int = 0
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class BatchContents:
    """What is in a batch.

    rows: "FILE: row N" of each sample or pair. label_tokens: tokens in the loss; for pairs, those of
    both answers. images: those of all samples or pairs.
    """

    rows: tuple[str, ...]
    label_tokens: int
    images: int


class Batches:
    """An endless iterable of batches; `state_dict` says where the last one returned ends.

    Attributes:
        contents: contents of the latest batches, oldest first; consumers pop them.
        stats: counts of the rows so far.
        features: the feature cache that ``collate`` reads, if any.
    """

    def __init__(
        self,
        order: Callable[[int], Iterator[SampleIndex]],
        dataset: Dataset,
        group_rows: RowGrouping,
        collate: Callable[[list[list[Example]]], Any],
        stats: DataStats,
        loading: LoaderConfig,
        features: FeatureCache | None = None,
    ):
        """
        Args:
            order: position -> the run's samples from there on.
            dataset: `SampleIndex` -> `Example` or `SkippedRow`, in the workers.
            collate: rows of a batch -> its tensors, or what else the trainer takes.
        """
        self.order, self.dataset, self.group_rows, self.collate = order, dataset, group_rows, collate
        self.stats, self.loading, self.features = stats, loading, features
        self.contents: deque[BatchContents] = deque(maxlen=REMEMBERED_BATCHES)
        self._next = 0  # position of the next sample
        self._waiting: list[int] = []  # positions before it that are held back

    def __iter__(self) -> Iterator[Any]:
        for rows in self.group_rows(self._examples()):
            returned = {position for row in rows for position, _ in row}
            self._waiting = [position for position in self._waiting if position not in returned]
            examples = [[example for _, example in row] for row in rows]
            self.contents.append(_contents(itertools.chain.from_iterable(examples)))
            yield self.collate(examples)

    @property
    def epoch(self) -> float | None:
        """Epochs of training data seen so far; None if a source is streamed."""
        length = self.stats.epoch_length
        return None if length is None else round(self._next / length, 4)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next sample, those held back before it, and the counts so far."""
        # The keys are part of the checkpoint format.
        return {"next": self._next, "waiting": list(self._waiting), "tally": self.stats.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were returned before `state_dict`."""
        self._next, self._waiting = state["next"], list(state["waiting"])
        self.stats.load_state_dict(state["tally"])

    def _examples(self) -> Iterator[PlacedExample]:
        """Yield the examples from the current state on.

        Those that were held back come first; they are counted already.
        """
        start, held_back = self._next, {*self._waiting}
        for position, result in self._results(min([start, *held_back]), held_back, start):
            if position >= start:
                self._next = position + 1
                self._count(result)
            if isinstance(result, Example):
                if position >= start:
                    self._waiting.append(position)
                yield position, result

    def _count(self, result: Example | SkippedRow) -> None:
        if isinstance(result, SkippedRow):
            self.stats.count_skipped(result)
        else:
            self.stats.count_used(result.encoded.cut, result.encoded.rewritten)

    def _results(
        self, first: int, held_back: set[int], start: int
    ) -> Iterator[tuple[int, Example | SkippedRow]]:
        """Yield what this process's samples give: those held back, and all from position ``start`` on."""
        needed = (
            (position, index)
            for position, index in enumerate(self.order(first), start=first)
            if (position >= start or position in held_back) and self._is_mine(position)
        )
        for results in self._prepared(needed):
            yield from results

    def _is_mine(self, position: int) -> bool:
        return position // self.loading.batch_size % self.loading.world_size == self.loading.rank

    def _prepared(
        self, indices: Iterator[tuple[int, SampleIndex]]
    ) -> Iterable[list[tuple[int, Example | SkippedRow]]]:
        """Prepare the samples in their order, as many at a time as a batch has rows."""
        loader = DataLoader(
            _PlacedDataset(self.dataset),
            batch_sampler=_BatchSampler(indices, self.loading.batch_size),
            num_workers=self.loading.workers,
            collate_fn=pack_tensors if self.loading.workers else list,
            worker_init_fn=_leave_signals_to_main_process,
            generator=torch.Generator(),  # its own, so that loading does not consume torch's random numbers
        )
        return map(unpack_tensors, loader) if self.loading.workers else loader


class _PlacedDataset(Dataset):
    """Keeps the position of each sample with its result."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: tuple[int, SampleIndex]) -> tuple[int, Example | SkippedRow]:
        position, sample = index
        return position, self.dataset[sample]


class _BatchSampler:
    def __init__(self, indices: Iterator[tuple[int, SampleIndex]], batch_size: int):
        self.indices, self.batch_size = indices, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, SampleIndex]]]:
        return iter(lambda: list(itertools.islice(self.indices, self.batch_size)), [])


def pack_tensors(value: Any) -> PackedTensors:
    """Pickle a value, and copy the bytes of all CPU tensors in it into one tensor, to be sent from a worker.

    Each tensor that comes from another process holds a file open while it lives, and a process may have 1,024
    of them; with torch's file_system sharing it would hold shared memory instead, of which a container often
    has 64 MiB. Examples that are held back for packing alone would exceed both.
    """
    file = io.BytesIO()
    pickler = _TensorPickler(file)
    pickler.dump(value)
    tensors = pickler.tensors or [torch.empty(0, dtype=torch.uint8)]
    return file.getvalue(), [len(tensor) for tensor in pickler.tensors], torch.cat(tensors)


def unpack_tensors(packed: PackedTensors) -> Any:
    """Return the value of `pack_tensors`, each tensor in memory of its own in this process."""
    content, sizes, tensors = packed
    buffers: Any = (tensor.numpy() for tensor in tensors.split(sizes))
    return pickle.loads(content, buffers=buffers)


class _TensorPickler(pickle.Pickler):
    """Leaves the bytes of tensors out of the pickle, and collects them in ``tensors``, each (N,)."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=5, buffer_callback=lambda buffer: None)
        self.tensors: list[Tensor] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        tensor = obj.contiguous().view(-1).view(torch.uint8)
        self.tensors.append(tensor)
        array: Any = tensor.numpy()  # a buffer, which numpy declares from Python 3.12 on
        return _tensor_from_bytes, (pickle.PickleBuffer(array), obj.dtype, obj.shape)


def _tensor_from_bytes(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(content))
    return tensor


def one_sample_per_row(batch_size: int) -> RowGrouping:
    """Return a grouping into batches of ``batch_size`` rows of one example each, in order."""

    def group(examples: Iterator[PlacedExample]) -> Iterator[list[list[PlacedExample]]]:
        return iter(lambda: [[example] for example in itertools.islice(examples, batch_size)], [])

    return group


def packed_rows(batch_size: int, row_length: int) -> RowGrouping:
    """Return a grouping into batches of ``batch_size`` rows, filled up to ``row_length`` tokens each."""

    def group(examples: Iterator[PlacedExample]) -> Iterator[list[list[PlacedExample]]]:
        rows = pack(examples, lambda placed: placed[1].encoded.text_tokens, row_length)
        return iter(lambda: list(itertools.islice(rows, batch_size)), [])

    return group


def sorted_by_length(
    order: SampleOrder, length_of: Callable[[SampleIndex], int], batch_size: int
) -> Callable[[int], Iterator[SampleIndex]]:
    """Return an order with samples of similar length next to each other.

    Like the order itself, it can be entered at any position.
    """
    window = LENGTH_WINDOW * batch_size

    def indices(start: int) -> Iterator[SampleIndex]:
        first = start // window * window
        grouped = group_by_length(order.indices(first), length_of, batch_size, window, order.seed)
        return itertools.islice(grouped, start - first, None)

    return indices


def _contents(examples: Iterable[Example]) -> BatchContents:
    examples = list(examples)
    return BatchContents(
        rows=tuple(example.where for example in examples),
        label_tokens=sum(example.encoded.label_tokens for example in examples),
        images=sum(example.encoded.images for example in examples),
    )


def _leave_signals_to_main_process(worker: int) -> None:
    """Ignore SIGINT and SIGTERM unless the main process sends it.

    Ctrl-C reaches every process of a terminal, and the SIGTERM of a batch system every process of a job; the
    main process decides what to do, and needs its batches until then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, args=(os.getppid(),), daemon=True).start()


def _exit_on_parents_sigterm(parent: int) -> None:
    """Wait for the SIGTERM with which a `DataLoader` ends its workers; ignore that of other processes."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

"""Loaders: each sample depends only on (seed, epoch, index), not on workers, ranks, or where a run resumed."""

import hashlib
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import queues
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from exnorm.config.errors import UserError
from exnorm.data.bad_images import BadImages
from exnorm.data.files import BadImage
from exnorm.data.splits import Images, Samples
from exnorm.data.transforms import Transform
from exnorm.runs.loader_room import BATCHES_AHEAD, check_room
from exnorm.runs.subprocesses import STOP_SIGNALS, end_with_process, stop_signals_blocked

Key = tuple[int, int]  # epoch, index


def mixed_seed(*parts: int) -> int:
    """Return a 63-bit seed from some integers; other integers give an unrelated seed."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SeededImages(Dataset[tuple[Any, ...]]):
    """Cropped images in uint8 with their targets, addressed by (epoch, index).

    Args:
        transform: crops an image and, where that is a mask, its target.
        bad_images: replaces broken images; without it they raise an error.
    """

    def __init__(
        self, images: Samples, transform: Transform, *, seed: int, bad_images: BadImages | None = None
    ) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        """Return the image, (height, width, 3) in uint8, and its targets: a label and its clean label, or a mask.

        Raises:
            UserError: the image is broken and may not be replaced.
        """
        epoch, index = key
        seed = mixed_seed(self.seed, epoch, index)
        sample = self._open(index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return self.transform(*sample)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, ...]:
        """Return a batch: the samples that these keys address, stacked.

        Decoded images are cropped together if the transform can do that. The pixels are the same.

        Raises:
            UserError: an image is broken and may not be replaced.
        """
        return self._cropped_together(keys) or default_collate([self[key] for key in keys])

    def _cropped_together(self, keys: Sequence[Key]) -> tuple[Tensor, ...] | None:
        images = self.images
        if not isinstance(images, Images) or images.read_pixels is None or self.transform.crop_batch is None:
            return None
        indices = [index for _, index in keys]
        seeds = [mixed_seed(self.seed, epoch, index) for epoch, index in keys]
        pixels = self.transform.crop_batch(images.read_pixels(np.array(indices)), seeds)
        if pixels is None:
            return None
        labels, clean_labels = zip(*map(images.labels_of, indices), strict=True)
        return torch.from_numpy(pixels), torch.tensor(labels), torch.tensor(clean_labels)

    def _open(self, index: int) -> tuple[Any, ...]:
        if self.bad_images is not None:
            return self.bad_images.open(self.images, index)
        try:
            return self.images.open(index)
        except BadImage as bad:
            raise UserError(
                f"{bad}. Leaving it out would change the result. Repair it, or list it in a file with a path on each "
                "line and type data.exclude=FILE; the record then counts the excluded images"
            ) from None


class TrainBatches(Sampler[list[Key]]):
    """One rank's share of each global batch, between any two steps; an epoch's last, incomplete batch is dropped.

    Steps are counted over all epochs. Sample i of the global batch belongs to replica i // samples. The ranks have
    consecutive shares.
    """

    def __init__(self, count: int, *, total: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.total, self.seed = count, total, seed
        self.share = total // ranks
        self.offset = rank * self.share
        self.first_step, self.end = 0, self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in an epoch."""
        return self.count // self.total

    def between(self, first_step: int, end: int) -> None:
        """Set the first step of the next iteration, and the step before which it ends."""
        self.first_step, self.end = first_step, end

    def __len__(self) -> int:
        return self.end - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        order: list[int] = []
        for step in range(self.first_step, self.end):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if not order or step_in_epoch == 0:
                order = self._order(epoch)
            first = step_in_epoch * self.total + self.offset
            yield [(epoch, index) for index in order[first : first + self.share]]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        return torch.randperm(self.count, generator=generator).tolist()


def fixed_batches(indices: Sequence[int], size: int, *, epoch: int = 0) -> list[list[Key]]:
    """Return indices in batches of `size`; the last one may be smaller."""
    return [[(epoch, index) for index in indices[i : i + size]] for i in range(0, len(indices), size)]


class Loader:
    """Iterates over batches of a set on a device: normalized images and their targets.

    Its processes, at most one per core, stay alive between epochs. In memory the channels of a batch come last, as in
    its images, so no transposing copy is needed.

    Args:
        channels_last: False for a copy with the channels first.

    Raises:
        UserError: this machine has too little shared memory, or allows too few open files, for the processes.
    """

    def __init__(
        self,
        dataset: SeededImages,
        batches: TrainBatches | list[list[Key]],
        *,
        workers: int,
        device: torch.device,
        channels_last: bool = True,
    ) -> None:
        workers = min(workers, os.cpu_count() or 1)
        self.dataset, self.device, self.channels_last = dataset, device, channels_last
        samples = batches.share if isinstance(batches, TrainBatches) else max(map(len, batches), default=0)
        check_room(workers, batches=len(batches), batch_bytes=samples * dataset.transform.sample_bytes)
        self.batches: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=partial(_obey_trainer_alone, os.getpid()),
            collate_fn=_as_it_is,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        with stop_signals_blocked():
            batches = iter(self.batches)  # starts the processes
        for batch in batches:
            pixels, *targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            images = self.dataset.transform.normalize(pixels)
            yield images if self.channels_last else images.contiguous(), *targets


def _as_it_is(batch: Any) -> Any:
    return batch  # `SeededImages.__getitems__` has stacked it


def _obey_trainer_alone(trainer: int, worker: int) -> None:
    # A signal to all processes of a job would end the loaders first, and then the trainer before its checkpoint.
    if hasattr(signal, "sigwaitinfo"):  # Linux, where this process began with the signals blocked
        threading.Thread(target=_end_with_trainers_word, daemon=True).start()
    end_with_process(trainer)
    sys.excepthook = _print_unless_trainer_is_gone
    # Python's hook for this, which is not public. tests/test_small_machines.py notices if it changes.
    queues.Queue._on_queue_feeder_error = staticmethod(_end_without_batch)  # pyright: ignore[reportAttributeAccessIssue]


def _print_unless_trainer_is_gone(kind: type[BaseException], problem: BaseException, trace: Any) -> None:
    # The thread that hands out batches loses its connection a moment before the kernel ends this process.
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, problem, trace)


def _end_without_batch(problem: Exception, batch: Any) -> None:
    # Python would print a traceback and lose the batch, and the trainer would wait for it forever.
    if not isinstance(problem, ConnectionError):
        print(f"exnorm: a loader process cannot hand out a batch: {problem}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with_trainers_word() -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)

"""Loaders: each sample depends only on (seed, epoch, index), not on workers, ranks, or where a run resumed."""

import hashlib
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from exnorm.config.errors import UserError
from exnorm.data.bad_images import BadImages
from exnorm.data.files import BadImage
from exnorm.data.splits import Images
from exnorm.data.transforms import Transform
from exnorm.runs.loader_room import BATCHES_AHEAD, check_room
from exnorm.runs.subprocesses import STOP_SIGNALS, stop_signals_blocked

Key = tuple[int, int]  # epoch, index


def mixed_seed(*parts: int) -> int:
    """Return a 63-bit seed from some integers; other integers give an unrelated seed."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SeededImages(Dataset[tuple[Tensor, int, int]]):
    """Cropped images in uint8 with their label and their clean label, addressed by (epoch, index).

    Args:
        bad_images: replaces broken images; without it they raise an error.
    """

    def __init__(self, images: Images, transform: Transform, *, seed: int, bad_images: BadImages | None = None) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images

    @property
    def sample_bytes(self) -> int:
        """The size of a cropped image."""
        return 3 * self.transform.size**2

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:
        """Return the image, (height, width, 3) in uint8, its label and its clean label.

        Raises:
            UserError: the image is broken and may not be replaced.
        """
        epoch, index = key
        seed = mixed_seed(self.seed, epoch, index)
        index, image = self._open(index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        label = self.images.labels[index]
        clean = label if self.images.clean_labels is None else self.images.clean_labels[index]
        return torch.as_tensor(self.transform.crop(image)).permute(1, 2, 0), int(label), int(clean)

    def _open(self, index: int) -> tuple[int, Image.Image]:
        if self.bad_images is not None:
            return self.bad_images.open_image(self.images, index)
        try:
            return index, self.images.open_image(index)
        except BadImage as bad:
            raise UserError(
                f"{bad}. Leaving it out would change the result. Repair it, or list it in a file with a path on each "
                "line and type data.exclude=FILE; the record then counts the excluded images"
            ) from None


class TrainBatches(Sampler[list[Key]]):
    """One rank's share of each global batch of an epoch, from any step on; the last, incomplete batch is dropped.

    Sample i of the global batch belongs to replica i // samples. The ranks have consecutive shares.
    """

    def __init__(self, count: int, *, total: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.total, self.seed = count, total, seed
        self.share = total // ranks
        self.offset = rank * self.share
        self.epoch = 0
        self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in an epoch."""
        return self.count // self.total

    def start(self, epoch: int, first_step: int) -> None:
        """Set the epoch, and the step in it, at which the next iteration begins."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for step in range(self.first_step, self.steps_per_epoch):
            first = step * self.total + self.offset
            yield [(self.epoch, index) for index in order[first : first + self.share]]


def fixed_batches(indices: Sequence[int], size: int, *, epoch: int = 0) -> list[list[Key]]:
    """Return indices in batches of `size`; the last one may be smaller."""
    return [[(epoch, index) for index in indices[i : i + size]] for i in range(0, len(indices), size)]


class Loader:
    """Iterates over batches of a set on a device: normalized images, labels, clean labels.

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
        check_room(workers, batches=len(batches), batch_bytes=samples * dataset.sample_bytes)
        self.batches: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_obey_trainer_alone,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with stop_signals_blocked():
            batches = iter(self.batches)  # starts the processes
        for batch in batches:
            pixels, labels, clean = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            images = self.dataset.transform.normalize(pixels)
            yield images if self.channels_last else images.contiguous(), labels, clean


def _obey_trainer_alone(worker: int) -> None:
    # A signal to all processes of a job would end the loaders first, and then the trainer before its checkpoint.
    if hasattr(signal, "sigwaitinfo"):  # Linux, where this process began with the signals blocked
        threading.Thread(target=_end_with_trainers_word, daemon=True).start()


def _end_with_trainers_word() -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)

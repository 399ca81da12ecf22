"""`exnorm bench train`: compare training steps of a converted backbone with those of the unchanged timm model."""

import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from exnorm import ops
from exnorm.config.errors import UserError, suggest
from exnorm.diagnostics.bench import TABLES, append, bench_device, interleaved, print_rows, ratios, saved_bytes
from exnorm.surgery import convert

CLASSES = 1000


class _Trainer:
    """A model with its optimizer, on one batch."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, autocast: bool) -> None:
        self.model, self.x, self.labels, self.autocast = model.train(), x, labels, autocast
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return nn.functional.cross_entropy(self.model(self.x).float(), self.labels)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def peak_mib(self) -> float | str:
        """Peak GPU memory of one step."""
        if self.x.device.type != "cuda":
            return ""
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def run(
    model: str, norm: str, batch: int, image_size: int, backend: str, rounds: int, bf16: bool, folder: Path = TABLES
) -> None:
    """Measure, print a table and append it to `train.csv`."""
    if not timm.is_model(model):
        raise UserError(f"unknown model; {suggest(model, timm.list_models())}")
    device = bench_device()
    rows = measure(model, norm, batch, image_size, backend, rounds, bf16, device)
    print_rows(f"{model}, {image_size} px, {batch} images, back end {backend}", rows)
    setting = {"model": model, "image_size": image_size, "batch": batch, "precision": "bf16" if bf16 else "fp32"}
    append(folder / "train.csv", [{**setting, **row} for row in rows], device=device)


def measure(
    name: str, norm: str, batch: int, image_size: int, backend: str, rounds: int, bf16: bool, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row for the unchanged model and one for the converted model, measured in turn."""
    before = ops.get_backend()
    x = torch.randn(batch, 3, image_size, image_size, device=device)
    labels = torch.arange(batch, device=device) % CLASSES
    if device.type == "cuda":
        x = x.to(memory_format=torch.channels_last)
    trainers, first_s = {}, {}
    try:
        for label in ("timm", f"{norm} {backend}"):
            model = timm.create_model(name, num_classes=CLASSES)
            if label != "timm":
                ops.set_backend(backend)
                convert(model, norm)
            model = model.to(device)
            if device.type == "cuda":
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            trainers[label] = _Trainer(model, x, labels, bf16)
            start = time.perf_counter()
            trainers[label].step()
            first_s[label] = time.perf_counter() - start
        seconds = interleaved({label: trainer.step for label, trainer in trainers.items()}, rounds)
        return [
            {
                "layers": label,
                "rounds": rounds,
                "images_per_s": round(batch / sorted(values)[rounds // 2], 2),
                **ratios(values, seconds["timm"]),
                "saved_mib": round(
                    saved_bytes(trainers[label].loss, exclude=trainers[label].model.parameters()) / 2**20, 1
                ),
                "peak_mib": trainers[label].peak_mib(),
                "first_step_s": round(first_s[label], 3),
            }
            for label, values in seconds.items()
        ]
    finally:
        ops.set_backend(before)

"""The meaning of a batch setting: `8x32` fixes the mathematics, not the hardware. Imports no torch.

    8x32: BN's scope is 32 samples, the gradient is the mean over 256, the learning rate scales with 256.

A device with several replicas computes them as virtual replicas, in one pass or several. A replica that spans several
devices gets its statistics by an all-reduce among them.
"""

import re
from dataclasses import dataclass

from exnorm.config.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is distributed over devices.

    Attributes:
        replicas, samples: the batch setting, replicas x samples per replica.
        devices: number of processes, one per device.
        passes: forward-backward passes per optimizer step on each device.
        sync: BN's scope is the complete batch.
    """

    replicas: int
    samples: int
    devices: int = 1
    passes: int = 1
    sync: bool = False

    @property
    def total(self) -> int:
        """Return the samples of one optimizer step."""
        return self.replicas * self.samples

    @property
    def scope(self) -> int:
        """Return the samples in BN's scope."""
        return self.total if self.sync else self.samples

    @property
    def span(self) -> int:
        """Return the number of devices that one replica spans."""
        return max(1, self.devices // self.replicas)

    @property
    def replicas_per_device(self) -> int:
        """Return the complete replicas on one device; 1 if a replica spans several devices."""
        return max(1, self.replicas // self.devices)

    @property
    def replicas_per_pass(self) -> int:
        """Return the replicas in one forward pass of one device."""
        return self.replicas_per_device // self.passes

    def describe(self) -> str:
        """Return the line that every run prints."""
        devices = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        if self.span > 1:
            where = f"{devices}, {self.span} to a replica"
        elif self.replicas_per_device > 1:
            where = f"{devices} as {self.replicas_per_device} virtual replicas{' each' if self.devices > 1 else ''}"
        else:
            where = devices
        passes = f" in {self.passes} passes" if self.passes > 1 else ""
        return (
            f"batch {self.replicas}x{self.samples}: gradient over {self.total} samples, "
            f"BN's scope {self.scope}, on {where}{passes}"
        )


def parse_batch(text: str) -> tuple[int, int]:
    """Return `8x32` as (replicas, samples per replica).

    Raises:
        UserError: the text has another form, or a number is 0.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(text))
    if match is None:
        raise UserError(
            f"batch={text} is not possible. Give replicas x samples per replica, both at least 1, as in batch=8x32"
        )
    return int(match[1]), int(match[2])


def fits(replicas: int, samples: int, devices: int) -> bool:
    """Return whether the devices can share the replicas, or the samples of each replica, equally."""
    if devices <= replicas:
        return replicas % devices == 0
    return devices % replicas == 0 and samples % (devices // replicas) == 0


def fitting_devices(replicas: int, samples: int, *, limit: int) -> list[int]:
    """Return all numbers of devices up to `limit` that fit."""
    return [devices for devices in range(1, limit + 1) if fits(replicas, samples, devices)]


def plan_batch(text: str, *, devices: int, passes: int = 1, sync: bool = False) -> BatchPlan:
    """Distribute a batch over devices.

    Raises:
        UserError: a number of devices or passes does not fit; the message gives those that do.
    """
    replicas, samples = parse_batch(text)
    if devices < 1 or not fits(replicas, samples, devices):
        counts = ", ".join(map(str, fitting_devices(replicas, samples, limit=replicas * samples)))
        raise UserError(f"batch={text} does not fit on {devices} devices. trainer.devices can be {counts}")
    plan = BatchPlan(replicas, samples, devices, passes, sync)
    if passes < 1 or plan.replicas_per_device % passes:
        counts = [count for count in range(1, plan.replicas_per_device + 1) if plan.replicas_per_device % count == 0]
        raise UserError(
            f"trainer.passes={passes} does not divide the {plan.replicas_per_device} replicas of a device. It can be "
            f"{', '.join(map(str, counts))}"
        )
    if sync and passes > 1:
        raise UserError(
            f"norm.sync=true needs the complete batch at once, but trainer.passes={passes} splits it. "
            "Use trainer.passes=1 or more devices"
        )
    return plan

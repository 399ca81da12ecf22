"""Run the GPU tests and measure the speed of every normalizer on a GPU, in at most nine minutes.

    python scripts/gpu_visit.py OUT                     all parts, the most valuable first, each as a subprocess
    python scripts/gpu_visit.py OUT --seconds 300       as many parts as fit into 300 seconds
    python scripts/gpu_visit.py OUT --part "speed en"   one part
    python scripts/gpu_visit.py OUT --dry               tiny sizes; also runs on a CPU

Each measurement is written to OUT/gpu.csv at once. Append these rows to results/bench/gpu.csv. OUT/logs.tar.gz has the
output of the parts. If the machine lacks packages, make a folder of wheels on another machine and pass --wheels DIR:

    pip download --no-deps -d DIR hydra-core==1.3.8 omegaconf==2.3.1 timm==1.0.31 platformdirs
    pip wheel --no-deps -w DIR antlr4-python3-runtime==4.9.3
"""

import argparse
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NORMS = ("en", "bn", "sn", "gn")
BATCHES = (256, 32, 8)
# Name of each part and its limit in seconds; first what was never measured.
PARTS = {
    "facts": 40,
    "warm": 150,
    "tests": 180,
    "whole stock": 90,
    "whole en": 120,
    "layers": 60,
    "speed stock": 60,
    **{f"speed {norm}": 60 for norm in NORMS},
    "train": 150,
    **{f"whole {norm}": 90 for norm in NORMS[1:]},
    "profile en": 40,
    "host en": 30,
    "host stock": 30,
    "profile stock": 30,
}
COLUMNS = [
    "time",
    "device",
    "torch",
    "triton",
    "timm",
    "exnorm",
    "commit",
    "part",
    "norm",
    "backend",
    "batch",
    "image_size",
    "graph",
    "shape",
    "layer",
    "images_per_s",
    "ms",
    "host_ms",
    "kernels",
    "busy_ms",
    "peak_gib",
    "first_s",
    "gb_per_s",
    "passed",
    "seconds",
    "said",
]


def main() -> None:
    """Run the parts that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=530)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        sys.path.insert(0, str(ROOT))
        Visit(options.out, options.dry, options.skip).run(options.part)
        return
    environment = environment_with(options.wheels)
    end = time.monotonic() + options.seconds
    for part, limit in PARTS.items():
        left = end - time.monotonic()
        if part not in options.skip and left > min(20, limit):
            _run_apart(options, part, min(limit, left), environment)
    with tarfile.open(options.out / "logs.tar.gz", "w:gz") as archive:
        for log in sorted(options.out.glob("*.log")):
            archive.add(log, log.name)
            log.unlink()


def environment_with(wheels: Path | None) -> dict[str, str]:
    """Return an environment whose PYTHONPATH has this checkout first and then the installed wheels."""
    paths = [str(ROOT)]
    if wheels is not None:
        target = tempfile.mkdtemp()
        files = sorted(map(str, wheels.glob("*.whl")))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, *files]
        subprocess.run(command, check=True)
        paths.append(target)
    path = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def _run_apart(options: argparse.Namespace, part: str, limit: float, environment: dict[str, str]) -> None:
    start = time.monotonic()
    command = [sys.executable, __file__, str(options.out), "--part", part, *(["--dry"] if options.dry else [])]
    command += ["--skip", *options.skip]
    log = options.out / f"{part.replace(' ', '_')}.log"
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            code: Any = process.wait(timeout=limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
            os.killpg(process.pid, signal.SIGKILL)  # with all processes that it started
            process.wait()
            if isinstance(end, KeyboardInterrupt):
                raise SystemExit(130) from None
            code = "out of time"
    print(f"{part}: exit {code}, {time.monotonic() - start:.0f} s", flush=True)
    if code != 0:
        print(log.read_text()[-1500:], flush=True)


class Visit:
    """The parts. Every result is a row of OUT/gpu.csv."""

    def __init__(self, out: Path, dry: bool, skip: list[str]) -> None:
        import torch

        self.out, self.dry, self.skip = out, dry, skip
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")

    def run(self, part: str) -> None:
        """Run one part, by its name."""
        self.part = part
        name, *rest = part.split()
        start = time.monotonic()
        getattr(self, name)(*rest)
        if name in ("warm", "tests", "train"):
            self.row(seconds=round(time.monotonic() - start, 1))

    def row(self, **values: Any) -> None:
        """Append a row and write it to disk at once."""
        path = self.out / "gpu.csv"
        fresh = not path.exists()
        values = {**self._versions(), "part": self.part, **values}
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerow(values)
            file.flush()
            os.fsync(file.fileno())
        print({name: value for name, value in values.items() if name not in self._versions()}, flush=True)

    def _versions(self) -> dict[str, Any]:
        import timm
        import torch

        import exnorm

        try:
            from triton import __version__ as triton
        except ImportError:
            triton = ""
        device = torch.cuda.get_device_name() if self.cuda else "cpu"
        commit = os.environ.get("EXNORM_COMMIT", "") or _git_commit()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        versions = {"torch": torch.__version__, "triton": triton, "timm": timm.__version__}
        return {"time": now, "device": device, **versions, "exnorm": exnorm.__version__, "commit": commit}

    # Parts

    def facts(self) -> None:
        """Measure the speed of a copy, which no pass over memory can exceed."""
        import torch

        size = 2**24 if self.dry else 2**31
        x = torch.empty(size, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        self.row(layer="copy", gb_per_s=round(2 * size / self.ms(lambda: y.copy_(x)) / 1e6))

    def warm(self) -> None:
        """Compile everything that the other parts measure, in parallel."""
        parts = [*(f"speed {norm}" for norm in NORMS), "whole stock", "whole en"]
        jobs = [part.split() for part in parts if part not in self.skip]
        code = (
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from gpu_visit import Visit\n"
            "visit = Visit(Path(sys.argv[2]), sys.argv[5] == 'True', [])\n"
            "visit.compile_only(sys.argv[3], sys.argv[4])"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", code, str(ROOT / "scripts"), str(self.out), *job, str(self.dry)])
            for job in jobs
        ]
        for process in processes:
            process.wait()

    def compile_only(self, kind: str, norm: str) -> None:
        """Run two steps of each batch size without measuring."""
        for batch in self.batches() if kind == "speed" else self.batches()[:1]:
            step = self.training(norm, batch, whole=kind == "whole")
            step()
            step()
            self.sync()

    def tests(self) -> None:
        """Run the tests that need a GPU, several at a time: most of their time is compilation."""
        options = ["-v", "--durations=15", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
        arguments = [*options, "-p", "no:benchmark", "-m", "gpu", "tests/test_gpu.py"]
        if importlib.util.find_spec("xdist") is not None:
            arguments += ["-n", str(min(12, os.cpu_count() or 1))]
        command = [sys.executable, "-m", "pytest", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:  # at once, so that the log names what ran if the time is over
            print(line, end="", flush=True)
            said.append(line.strip())
        self.row(passed=process.wait() == 0, said=said[-1:])

    def speed(self, norm: str) -> None:
        """Measure a training step of ResNet-50 at each batch size, also in a CUDA graph."""
        for batch in self.batches():
            self.measure(norm, batch)
            if self.cuda:
                self.graph(norm, batch)

    def whole(self, norm: str) -> None:
        """Measure a training step with the complete model under torch.compile, also in a CUDA graph."""
        self.measure(norm, self.batches()[0], whole=True)
        if self.cuda:
            self.graph(norm, self.batches()[0], whole=True)

    def train(self) -> None:
        """Run `exnorm train` here in bf16, in a CUDA graph, in fp16, deterministically, and on segmentation."""
        graph = ["trainer.cuda_graph=true", "trainer.precision=bf16", "trainer.epochs=2"]
        scenes = ["task=segmentation", "data=glyph_scenes", "model=resnet_mini", "trainer.precision=bf16"]
        cases = (["trainer.precision=bf16"], graph, ["trainer.precision=fp16"], ["trainer.deterministic=true"], scenes)
        for extra in cases:
            runs = f"runs={tempfile.mkdtemp()}"
            command = ["train", "model=resnet18", "norm=en", "debug=fast", "logger=off", runs, *extra]
            start = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "exnorm", *command], cwd=ROOT, capture_output=True, text=True)
            said = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1:]
            seconds = round(time.monotonic() - start, 1)
            self.row(layer=" ".join(extra), passed=done.returncode == 0, seconds=seconds, said=said)
            if done.returncode:
                print(done.stdout[-3000:], done.stderr[-5000:])

    def layers(self) -> None:
        """Measure a layer with its ReLU, forward and backward, beside torch's. GB/s assume a traffic of 8 |x|."""
        import torch
        from torch import nn

        from exnorm import ops
        from exnorm.surgery import norm_class

        ops.set_backend("auto")
        shapes = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)][: 1 if self.dry else 5]
        for batch in self.batches()[:2]:
            for c, px in shapes:
                x = torch.randn(batch, c, px, px, device=self.device, dtype=torch.bfloat16)
                x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
                grad = torch.randn_like(x)
                candidates: dict[str, nn.Module] = {
                    "torch bn": nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True)),
                    "torch gn": nn.Sequential(nn.GroupNorm(32, c), nn.ReLU(inplace=True)),
                    **{norm: norm_class(norm)(c, act="relu") for norm in NORMS},
                }
                for name, layer in candidates.items():
                    milliseconds = self.ms(_step_of(layer.to(self.device), x, grad))
                    speed = round(16 * x.numel() / milliseconds / 1e6)
                    self.row(layer=name, shape=f"{batch}x{c}x{px}x{px}", ms=round(milliseconds, 3), gb_per_s=speed)

    def profile(self, norm: str) -> None:
        """Count and time the kernels of a step at the largest and the smallest batch, and list the longest ones."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        for batch in (self.batches()[0], self.batches()[-1]):
            step = self.training(norm, batch)
            for _ in range(3):
                step()
            self.sync()
            if not self.cuda:
                continue
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                step()
                self.sync()
            times: dict[str, list[float]] = {}
            events = [event for event in record.events() or [] if event.device_type == DeviceType.CUDA]
            for event in events:
                times.setdefault(event.name[:70], []).append(event.device_time)
            longest = sorted(((round(sum(each)), len(each), name) for name, each in times.items()), reverse=True)[:30]
            busy_ms = round(sum(map(sum, times.values())) / 1e3, 2)
            print("microseconds, launches, kernel", *longest, sep="\n")
            self.row(norm=norm, batch=batch, kernels=len(events), busy_ms=busy_ms, said=longest[:3])

    def host(self, norm: str) -> None:
        """Measure steps of the smallest batch with and without a thread for the backward, and the host by function."""
        import cProfile
        import pstats

        import torch

        batch = self.batches()[-1]
        step = self.training(norm, batch)
        for threads in (True, False, True, False):
            with torch.autograd.set_multithreading_enabled(threads):
                milliseconds = self.ms(step, 20)
            said = f"backward in {'a' if threads else 'no'} thread of its own"
            self.row(norm=norm, batch=batch, ms=round(milliseconds, 2), said=said)
        profiler = cProfile.Profile()  # it sees this thread alone
        with torch.autograd.set_multithreading_enabled(False):
            profiler.enable()
            for _ in range(10):
                step()
            profiler.disable()
        self.sync()
        for order in ("tottime", "cumtime"):
            pstats.Stats(profiler).sort_stats(order).print_stats(45)

    # Measurement

    def batches(self) -> tuple[int, ...]:
        """Return the batch sizes in images per step."""
        return (4, 2) if self.dry else BATCHES

    def training(self, norm: str, batch: int, *, whole: bool = False) -> Callable[[], None]:
        """Return a training step of ResNet-50: bfloat16, channels last, SGD. `stock` is timm's unchanged model."""
        import timm
        import torch
        from torch import nn

        from exnorm import ops
        from exnorm.norms import commit_running_stats, configure_scope
        from exnorm.surgery import convert

        torch.manual_seed(0)
        model = timm.create_model("resnet18" if self.dry else "resnet50")
        if norm != "stock":
            ops.set_backend("auto" if self.cuda else "eager")
            convert(model, norm)
            configure_scope(model)
        model = model.to(device=self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        net = torch.compile(model) if whole else model
        pixels = 32 if self.dry else 224
        x = torch.randn(batch, 3, pixels, pixels, device=self.device).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(batch, device=self.device) % 1000
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

        def step() -> None:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False):
                loss = nn.functional.cross_entropy(net(x).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            commit_running_stats(model)

        return step

    def measure(self, norm: str, batch: int, *, whole: bool = False) -> None:
        """Measure images per second, peak memory, and the time of the host."""
        import torch

        from exnorm import ops

        step = self.training(norm, batch, whole=whole)
        start = time.monotonic()
        step()
        self.sync()
        first_s = round(time.monotonic() - start, 2)
        step()
        self.sync()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        milliseconds = self.ms(step, 20)
        found: dict[str, Any] = {"images_per_s": round(batch / milliseconds * 1e3, 1), "ms": round(milliseconds, 2)}
        if self.cuda:
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            self.sync()
            start = time.perf_counter()
            step()
            found["host_ms"] = round((time.perf_counter() - start) * 1e3, 1)
            self.sync()
        backend = ("" if norm == "stock" else ops.get_backend()) + (" whole model" if whole else "")
        size = 32 if self.dry else 224
        self.row(norm=norm, backend=backend.strip(), batch=batch, image_size=size, first_s=first_s, **found)

    def graph(self, norm: str, batch: int, *, whole: bool = False) -> None:
        """Measure the training step captured in a CUDA graph."""
        import torch

        step = self.training(norm, batch, whole=whole)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                step()
        except Exception as problem:  # noqa: BLE001  # the row has the error of the capture
            self.row(norm=norm, batch=batch, graph=True, said=str(problem)[:300])
            return
        milliseconds = self.ms(captured.replay, 20)
        self.row(
            norm=norm, backend="whole model" if whole else "", batch=batch, image_size=32 if self.dry else 224,
            graph=True, ms=round(milliseconds, 2), images_per_s=round(batch / milliseconds * 1e3, 1),
        )  # fmt: skip

    def ms(self, call: Callable[[], Any], repeats: int = 10) -> float:
        """Return the median time of a call in milliseconds, by the device's clock."""
        import torch

        if not self.cuda:
            call()
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        pairs = []
        for _ in range(repeats):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return sorted(first.elapsed_time(last) for first, last in pairs)[repeats // 2]

    def sync(self) -> None:
        """Wait for the device."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()


def _step_of(layer: Any, x: Any, grad: Any) -> Callable[[], None]:
    import torch

    def step() -> None:
        x.grad = None
        with torch.autocast(x.device.type, dtype=x.dtype):  # in which torch's GroupNorm computes in float32
            y = layer(x)
        y.backward(grad.to(y.dtype))

    return step


def _git_commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()

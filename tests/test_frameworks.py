"""Converted models in the training loops of Lightning and of Hugging Face's Trainer, through the two examples."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, varied
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import exnorm
from exnorm.norms import BatchScopeNorm, Norm, commit_running_stats, configure_scope

torch.set_num_threads(1)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update(OFFLINE)  # read when transformers is imported
SAMPLES, BATCH = 24, 4  # six steps in an epoch
# What the frameworks say about a short run on a CPU.
quiet = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", r"ignore:(?s).*(num_workers|pin_memory|`training_step`).*"
)
pytestmark = [pytest.mark.slow, quiet]
Outcome = dict[str, Tensor]


def example(name: str) -> ModuleType:
    """Return a script of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples() -> tuple[Tensor, Tensor]:
    """Images whose brightness says the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % 10
    return torch.randn(SAMPLES, 1, 32, 32, generator=generator) + labels[:, None, None, None] / 3, labels


def rows() -> list[dict[str, Any]]:
    """The same samples, as the Trainer wants them."""
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(*samples(), strict=True)]


def values(model: nn.Module) -> Outcome:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def updates(model: nn.Module) -> set[int]:
    """How often the layers updated their running statistics."""
    return {int(layer.num_batches_tracked) for layer in model.modules() if isinstance(layer, BatchScopeNorm)}


def falls(losses: list[float]) -> bool:
    """Whether the last epoch's losses are clearly below the first one's."""
    return sum(losses[-6:]) < 0.92 * sum(losses[:6])


def logits(model: nn.Module) -> Tensor:
    """Outputs in evaluation mode."""
    with torch.no_grad():
        found = model.eval()(samples()[0])
    return found if isinstance(found, Tensor) else found.logits


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


class Lightning:
    """Runs of Lightning, with the example's module."""

    def __init__(self, folder: Path) -> None:
        self.bf16: dict[str, Any] = {"precision": "bf16-mixed"}
        self.accumulate: dict[str, Any] = {"accumulate_grad_batches": 3}
        self.still: dict[str, Any] = {"lr": 0.0}
        self.folder, self.example = folder, example("lightning_module")
        self.losses: list[float] = []

    def model(self, norm: str = "en") -> Any:
        torch.manual_seed(0)
        return self.example.Classifier(norm)

    def clip(self, norm: float) -> dict[str, Any]:
        return {"gradient_clip_val": norm}

    def run(self, model: Any, epochs: int = 1, resume: Path | None = None, **options: Any) -> Path:
        """Train over the samples in their order; return the checkpoint of the end."""
        import lightning

        model.lr = options.pop("lr", model.lr)

        losses = self.losses

        class Losses(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                losses.append(float(outputs["loss"]))

        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=self.folder,
            callbacks=[Losses()],
            **options,
        )
        loader = DataLoader(TensorDataset(*samples()), BATCH)
        trainer.fit(model, loader, loader, ckpt_path=resume)
        file = self.folder / f"{epochs}.ckpt"
        trainer.save_checkpoint(file)
        return file

    def load(self, checkpoint: Path, norm: str) -> nn.Module:
        return self.example.Classifier.load_from_checkpoint(checkpoint)


class HuggingFace:
    """Runs of the Trainer of transformers, with the example's network."""

    def __init__(self, folder: Path) -> None:
        self.bf16: dict[str, Any] = {"bf16": True}
        self.accumulate: dict[str, Any] = {"gradient_accumulation_steps": 3}
        self.still: dict[str, Any] = {"learning_rate": 0.0, "train_sampling_strategy": "sequential"}
        self.folder, self.example = folder, example("hf_trainer")
        self.losses: list[float] = []

    def model(self, norm: str = "en") -> Any:
        torch.manual_seed(0)
        return self.example.network(norm)

    def clip(self, norm: float) -> dict[str, Any]:
        return {"max_grad_norm": norm}

    def run(self, model: Any, epochs: int = 1, resume: Path | None = None, **options: Any) -> Path:
        """Train over the samples in an order that the Trainer draws; return the checkpoint of the end."""
        from transformers import Trainer, TrainingArguments

        given: dict[str, Any] = {"max_grad_norm": 0.0, "optim": "adamw_torch", "learning_rate": 2e-3} | options
        arguments = TrainingArguments(
            str(self.folder),
            use_cpu=True,
            num_train_epochs=epochs,
            lr_scheduler_type="constant",
            per_device_train_batch_size=BATCH,
            logging_steps=1,
            save_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            **given,
        )
        trainer = Trainer(model, arguments, train_dataset=rows())  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        self.losses += [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return self.folder / f"checkpoint-{trainer.state.global_step}"

    def load(self, checkpoint: Path, norm: str) -> nn.Module:
        return self.example.load(str(checkpoint), norm)


Framework = Lightning | HuggingFace


@pytest.fixture(params=[Lightning, HuggingFace])
def framework(request: pytest.FixtureRequest, tmp_path: Path) -> Framework:
    return request.param(tmp_path)


@pytest.mark.parametrize("norm", varied(["en", "sn", "gn"], always=["en"]))
def test_the_loop_moves_all_that_a_layer_learns_and_its_running_statistics(framework: Framework, norm: str) -> None:
    """Every norm is replaced, the loss falls, and the checkpoint gives the outputs of the trained model.

    A validation changes no running statistics.
    """
    model = framework.model(norm)
    rows = exnorm.audit(model)
    assert len(rows) > 5 and all(row.replacement for row in rows)
    before = values(model)
    checkpoint = framework.run(model, epochs=4)
    assert len(framework.losses) == 24 and falls(framework.losses)
    after = values(model)
    assert [name for name, value in before.items() if torch.equal(after[name], value)] == []
    assert updates(model) == (set() if norm == "gn" else {24})
    assert torch.equal(logits(framework.load(checkpoint, norm)), logits(model))


def test_a_resumed_training_is_the_uninterrupted_one(framework: Framework) -> None:
    """Bit-equal, with the running statistics; the second process has another network when it starts."""
    whole = framework.model()
    framework.run(whole, epochs=4)
    checkpoint = framework.run(framework.model(), epochs=2)
    resumed = framework.model()
    for parameter in resumed.parameters():
        nn.init.normal_(parameter)
    torch.manual_seed(1)
    framework.run(resumed, epochs=4, resume=checkpoint)
    assert_equal(values(resumed), values(whole))
    assert torch.equal(logits(resumed), logits(whole))


def test_accumulation_has_the_gradient_of_all_passes_and_updates_statistics_in_each(framework: Framework) -> None:
    """As with torch's BN: six passes, two steps, six updates of the running statistics."""
    model = framework.model()
    steps: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    framework.run(model, **framework.accumulate)
    hook.remove()
    assert len(steps) == 2 and updates(model) == {6}


def test_accumulation_can_update_the_statistics_once_per_step(framework: Framework) -> None:
    """`configure_scope`, and `commit_running_stats` after each step: the mean over the passes, as in `exnorm train`."""
    models = framework.model(), framework.model()
    for layer in (*models[0].modules(), *models[1].modules()):
        if isinstance(layer, BatchScopeNorm):
            layer.momentum = None  # the cumulative mean: the same in two updates by three passes as in six updates
    configure_scope(models[1])
    still = framework.accumulate | framework.still
    framework.run(models[0], **still)
    hook = register_optimizer_step_post_hook(lambda *_: commit_running_stats(models[1]))
    framework.run(models[1], **still)
    hook.remove()
    assert [updates(model) for model in models] == [{6}, {2}]
    for name, value in values(models[0]).items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(values(models[1])[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_clipping_bounds_the_gradients_of_the_layers_too(framework: Framework) -> None:
    model = framework.model()
    limit, norms = 0.01, []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))

    hook = register_optimizer_step_post_hook(note)
    framework.run(model, **framework.clip(limit))
    hook.remove()
    assert norms == pytest.approx([limit] * 6, rel=0.02)


def test_bfloat16_has_finite_losses_that_fall_and_statistics_in_float32(framework: Framework) -> None:
    model = framework.model()
    seen = set()
    for layer in model.modules():
        if isinstance(layer, Norm):
            layer.register_forward_pre_hook(lambda layer, args: seen.add(args[0].dtype))
    framework.run(model, epochs=4, **framework.bf16)
    assert falls(framework.losses) and torch.tensor(framework.losses).isfinite().all()
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in values(model).values()} == {torch.float32, torch.int64}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("script", "pattern"),
    [("lightning_module", r"val/top1\s+│\s+([\d.]+)"), ("hf_trainer", r"'eval_top1': ([\d.]+)")],
    ids=["lightning", "huggingface"],
)
def test_the_example_learns_the_digits(script: str, pattern: str, tmp_path: Path) -> None:
    """Before, after, and loaded from the file: below 30 %, above 85 %, the same."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py")],
        cwd=tmp_path,
        env=os.environ | OFFLINE | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after, loaded = (float(text) for text in re.findall(pattern, done.stdout))
    assert before < 30 and after > 85 and loaded == after
    assert "-> left" not in done.stdout and "ExemplarNorm" in done.stdout


def test_the_snippets_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in their order, as one script; the page's names for data are those of the samples here."""
    import timm

    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n|(?<=\n)\n(?=    ))+", page, flags=re.MULTILINE)
    assert len(blocks) == 8
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(*samples()), BATCH)
    names: dict[str, Any] = {"loader": loader, "train_set": rows(), "val_set": rows()}
    torch.manual_seed(0)
    names["MyNetwork"] = lambda: timm.create_model("test_resnet", in_chans=1, num_classes=10)
    names["BACKBONE"] = str(tmp_path / "backbone")
    example("hf_trainer").ResNetForImageClassification(example("hf_trainer").CONFIG).save_pretrained(names["BACKBONE"])
    for block in blocks:
        exec(textwrap.dedent(block), names)  # a name that a block gives serves the next ones, as for a reader
    counts = {"model": {12}, "classifier": {6}, "accumulating": {2}, "network": {6}, "pretrained": {2}}
    assert {name: updates(names[name]) for name in counts} == counts
    assert torch.equal(logits(names["again"]), logits(names["network"]))
    assert torch.equal(logits(names["restored"]), logits(names["classifier"]))

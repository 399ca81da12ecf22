"""Train a ResNet of Hugging Face with Exemplar Normalization in its Trainer: `python examples/hf_trainer.py`.

It needs `pip install transformers accelerate`. The data are the UCI digits that scikit-learn ships, and the network
starts from random weights, so nothing is downloaded.
"""

from typing import Any

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.utils.data import Subset, random_split
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import exnorm

CONFIG = ResNetConfig(
    num_channels=1, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10
)


def network(norm: str = "en") -> ResNetForImageClassification:
    """Return a small ResNet whose normalization layers are replaced."""
    return exnorm.convert(ResNetForImageClassification(CONFIG), norm)


def load(folder: str, norm: str = "en") -> ResNetForImageClassification:
    """Return a network that `save_model` wrote. `from_pretrained` would build one with batch normalization."""
    model = exnorm.convert(ResNetForImageClassification(ResNetConfig.from_pretrained(folder)), norm)
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    return model


def digits() -> list[Subset[dict[str, Any]]]:
    """Return 1,438 samples for training and 359 for validation, enlarged from 8 to 32 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    samples = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    return random_split(samples, [0.8, 0.2], torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def top1(result: EvalPrediction) -> dict[str, float]:
    return {"top1": 100 * float((result.predictions.argmax(1) == result.label_ids).mean())}


def main() -> None:
    """Train for three epochs on the CPU, with an evaluation before the first one and after the last one."""
    torch.manual_seed(0)
    train_set, val_set = digits()
    model = network()
    print(exnorm.audit(model))
    options = TrainingArguments(
        "hf_run",
        use_cpu=True,
        num_train_epochs=3,
        learning_rate=2e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        dataloader_drop_last=True,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, options, train_dataset=train_set, eval_dataset=val_set, compute_metrics=top1)
    print(trainer.evaluate())
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model("hf_run/trained")
    print("loaded:", Trainer(load("hf_run/trained"), options, compute_metrics=top1).evaluate(val_set))


if __name__ == "__main__":
    main()

"""Train a ResNet of timm with Exemplar Normalization in Lightning: `python examples/lightning_module.py`.

It needs `pip install lightning`. The data are the UCI digits that scikit-learn ships, so nothing is downloaded.
"""

import lightning
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import exnorm


class Classifier(lightning.LightningModule):
    """A classifier whose normalization layers are replaced; `load_from_checkpoint` builds the same network again."""

    def __init__(self, norm: str = "en", lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        self.network = exnorm.convert(network, norm)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val/loss", nn.functional.cross_entropy(logits, labels))
        self.log("val/top1", 100 * (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


def digits() -> list[Dataset]:
    """Return 1,438 images for training and 359 for validation, enlarged from 8 to 32 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return random_split(TensorDataset(images, torch.tensor(labels)), [0.8, 0.2], torch.Generator().manual_seed(0))


def main() -> None:
    """Train for three epochs on the CPU, with a validation before the first one and after the last one."""
    lightning.seed_everything(0)
    train_set, val_set = digits()
    train_loader = DataLoader(train_set, 32, shuffle=True, drop_last=True)
    val_loader = DataLoader(val_set, 64)
    model = Classifier()
    print(exnorm.audit(model))
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.validate(model, val_loader)
    trainer.fit(model, train_loader, val_loader)
    trainer.validate(model, val_loader)
    trainer.save_checkpoint("lightning_run.ckpt")
    trainer.validate(Classifier.load_from_checkpoint("lightning_run.ckpt"), val_loader)


if __name__ == "__main__":
    main()

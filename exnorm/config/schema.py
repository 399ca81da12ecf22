"""The typed schema of a run: every key that a user can set, except those of `norm` and `task`, typed by their yaml.

Never change a default here or its meaning. The hash of a run (`exnorm.runs.identity`) leaves out values that equal
their default, so a new option does not change the hashes of earlier runs. `logger` and `ops` are in no hash.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

WHOLE = "whole"  # of test.window: the complete image


@dataclass
class ModelConfig:
    """A backbone, by its name in timm or torchvision."""

    name: str = MISSING  # a model of exnorm or timm
    architecture: str | None = None  # the name in timm, if `name` is exnorm's own
    drop_rate: float = 0.0  # dropout before the classifier or a head's last layer; SN's ImageNet code uses 0.5
    pretrained: bool = False  # weights from timm's hub
    init_from: str | None = None  # a run folder or a checkpoint file
    init_ratios_from: str | None = None  # the same, but only the parameters of the ratios are loaded
    replace: list[str] = field(default_factory=lambda: ["batch"])  # kinds of layers that the norm replaces
    options: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of the model's constructor
    head: str | None = None  # of a segmentation network: fcn | psp | deeplabv3; null: the task's default
    keep: list[str] = field(default_factory=list)  # patterns of names of layers that the norm does not replace


@dataclass
class NoiseConfig:
    """Label noise in training; see `exnorm.data.noise`."""

    kind: str = "none"  # none | symmetric | symmetric_exclusive | asymmetric | file
    rate: float = 0.0  # share of the training labels that noise is applied to
    seed: int = 0  # of the noise, not of the run
    file: str | None = None  # of kind=file: a CSV file with the label of each training image


@dataclass
class DataConfig:
    """A data set and how its images are cropped; the crop rules are the papers'."""

    name: str = MISSING  # the name of the data set
    module: str | None = None  # of a data set of another package, such as my_package.my_set
    root: str | None = None  # the folder of this data set
    roots: str | None = "${oc.env:EXNORM_DATA,null}"  # a folder with a subfolder for each set, named after it
    train_list: str | None = None  # a file with lines `path label`, instead of class folders
    val_list: str | None = None  # the same for validation
    source: str | None = None  # tar, or a source that timm reads: hfds/NAME
    origin: str | None = None  # of WebVision's images: google | flickr | all
    split: str | None = None  # of a set with several validation splits: val | test
    exclude: str | None = None  # a file with the paths of images to leave out
    max_bad_fraction: float = 0.01  # share of broken training images; a run with more ends
    val: list[str] | None = None  # data sets to validate on, the main one first; null: the set itself
    image_size: int = 224  # px, the side of a training crop and of the centre crop in validation
    resize: int = 256  # px, the shorter side before the centre crop
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # area of a random resized crop
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # its width : height
    hflip: float = 0.5  # probability of a horizontal flip
    padding: int | None = None  # px around an image before a random crop; null: random resized crop
    targets: str = "labels"  # labels | masks: what the data set gives for each image; a task needs one of them
    short_sides: list[int] | None = None  # px; with masks, one of them is drawn for a training image
    long_side: int | None = None  # px; with masks, the most that the longer side may have after resizing
    zoom: list[float] | None = None  # with masks, the range of a random factor on the size of a training image
    auto_augment: str | None = None  # a policy by its name in timm, such as rand-m9-mstd0.5-inc1 or augmix-m3-w3
    random_erasing: float = 0.0  # the probability that a rectangle of a training image becomes the mean colour
    rotation: float = 0.0  # degrees; with masks, the largest random rotation to either side
    blur: float = 0.0  # with masks, the probability of a Gaussian blur
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of each colour; subtracted from pixels
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # of each colour; pixels are divided by it
    epochs: int = 100  # the usual length of training on this data set; default of trainer.epochs
    schedule: str = "step"  # step | cosine | poly; default of optim.schedule
    lr_per_256: float = 0.1  # default of optim.lr_per_256
    workers: int = 4  # loader processes per device
    cache: bool | None = None  # decode the images once, into a file of the cache; null: if they are small and few
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    num_classes: int | None = None  # of a drawn set; for WebVision, use only the first ones
    num_train: int | None = None  # of a drawn set: the number of training images
    num_val: int | None = None  # of a drawn set: the number of validation images
    seed: int | None = None  # of a drawn set: the seed of the drawing, not of the run


@dataclass
class OptimConfig:
    """SGD as in the papers; `lr` null means `lr_per_256` x total batch / 256."""

    name: str = "sgd"  # an optimizer of timm
    lr: float | None = None  # the learning rate after the warm-up; null: lr_per_256 x total batch / 256
    lr_per_256: float = 0.1  # the learning rate for a batch of 256
    momentum: float = 0.9  # of SGD
    nesterov: bool = False  # Nesterov momentum
    weight_decay: float = 1e-4  # of the parameters that decay names
    decay: str = "all"  # all | weights: only weights of convolutions and linear layers, no parameter of a norm
    head_lr_scale: float = 1.0  # factor on the learning rate of all layers outside of the backbone
    schedule: str = "step"  # step | cosine | poly
    milestones: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.9])  # of step: fractions of the epochs
    gamma: float = 0.1  # of step: the factor on the learning rate at each milestone
    power: float = 0.9  # of poly: the exponent
    warmup: float = 0.0  # fraction of the epochs, linear from 0
    warmup_steps: int | None = None  # optimizer steps, in place of warmup
    clip_norm: float | None = None  # the largest norm that all gradients together may have; null: any


@dataclass
class TrainerConfig:
    """How long, where and how exactly to train."""

    epochs: int = 100  # passes over the training set
    steps: int | None = None  # the number of optimizer steps, in place of a number of epochs
    validate_every: int | None = None  # steps between validations; null: one epoch
    device: str = "auto"  # auto | cpu | cuda
    devices: int | None = None  # processes, one per device; null: as many GPUs as exist and fit the batch
    passes: int = 1  # forward-backward passes per optimizer step and device (gradient accumulation)
    precision: str = "fp32"  # fp32 | bf16 | fp16
    channels_last: bool = True  # the memory layout of images and activations
    ema: float | None = None  # decay of an average of the weights, such as 0.9999; it is what is validated and loaded
    compile: bool = False  # torch.compile of the complete model
    cuda_graph: bool = False  # replay the passes of a step from a CUDA graph; for few images per GPU
    deterministic: bool = False  # deterministic algorithms on a GPU
    checkpoint_every: int = 1  # epochs between checkpoints
    checkpoint_every_steps: int | None = None  # steps between further checkpoints inside an epoch
    max_hours: float | None = None  # hours after which a run stops with a checkpoint; the same command continues it
    snapshots: list[float] = field(default_factory=list)  # fractions of the epochs; checkpoints kept after them
    inference: str = "moving_average"  # moving_average | batch_average: BN's statistics at test time
    calibration_batches: int = 200  # batches of training images for batch_average
    eval_batch_size: int = 64  # validation images per batch and device


@dataclass
class LoggerConfig:
    """Where metrics go besides `metrics.jsonl`. Each file in `conf/logger/` turns on what it is named after."""

    csv: bool = False  # a CSV file in the run folder
    wandb: str = "off"  # Weights & Biases: off | offline | online
    project: str = "exnorm"  # the project of Weights & Biases
    sinks: dict[str, Any] = field(default_factory=dict)  # further sinks by name: _target_ and options of its class
    probe_images: int = 64  # validation images on which the ratios of every layer are measured


@dataclass
class OpsConfig:
    """The back end of the streaming primitives."""

    backend: str = "auto"  # auto (compiled on a CPU, triton on an NVIDIA GPU) | eager | compiled | triton


@dataclass
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    norm: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    task: Any = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    batch: str = "1x32"  # replicas x samples per replica
    seed: int = 0  # of weights, order of the images and augmentation; another seed is another run
    runs: str = "runs"  # the folder in which run folders are made
    fresh: bool = False  # start over instead of resuming


@dataclass
class TestConfig:
    """How a segmentation network is applied to a test image."""

    scales: list[float] = field(default_factory=lambda: [1.0])  # of data.resize; the mean over scales is scored
    flip: bool = False  # the mean with the mirrored image
    window: str = WHOLE  # whole | N: the side in px of a sliding window, which moves by 2/3 of it


@dataclass
class EvalConfig:
    """An evaluation of a finished or running run; null means the run's own value."""

    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: str = "last"  # last | best | a file
    inference: str | None = None  # moving_average | batch_average
    calibration_batches: int | None = None  # batches of training images for batch_average
    batch_size: int = 64  # images per batch and device
    device: str = "auto"  # auto | cpu | cuda
    devices: int | None = 1  # processes, one per device
    precision: str | None = None  # fp32 | bf16 | fp16
    test: TestConfig = field(default_factory=TestConfig)

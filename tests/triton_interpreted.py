"""Random layers through the Triton kernels, run by Triton's interpreter on the CPU, against float64: a row per layer.

    python tests/triton_interpreted.py SEED LAYERS_OF_EACH_NORM

A process of its own, since TRITON_INTERPRET must be set before the first import of Triton.
"""

import copy
import json
import os
import random
import sys
import warnings

os.environ |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
warnings.filterwarnings("ignore", message="overflow encountered in exp")  # sigmoid(-100) is 0

import torch  # noqa: E402
from norm_cases import NORMS  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from exnorm import ops  # noqa: E402
from exnorm.norms import BatchScopeNorm, commit_running_stats, configure_scope  # noqa: E402
from exnorm.surgery import norm_class  # noqa: E402
from exnorm.testing.layers import randomize  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def options_of(norm: str, draw: random.Random) -> dict[str, object]:
    """Random options of a norm."""
    options: dict[str, object] = {"eps": draw.choice([1e-5, 1e-3])}
    if norm == "gn":
        options["num_groups"] = draw.choice([1, 3, 32])
    elif norm == "en":
        options |= {
            "reduction": draw.choice([1, 3, 16]),
            "pi": draw.choice([1, 7]),
            "shared_affine": draw.random() < 0.3,
        }
        options |= {"hidden_act": draw.choice(["tanh", "relu"]), "conv": draw.random() < 0.8}
    elif norm == "sn":
        options |= {"groups": draw.choice([1, 1, 2]), "hard": draw.random() < 0.2}
    if norm in ("sn", "en") and draw.random() < 0.2:
        options["normalizers"] = ["bn", "in"]
    if norm not in ("en", "ssn"):
        options["affine"] = draw.random() < 0.8
    if issubclass(norm_class(norm), BatchScopeNorm):
        options["momentum"] = draw.choice([0.1, None, 1, 0]) if norm != "brn" else 0.1
    return options


def case_of(norm: str, draw: random.Random) -> dict[str, object]:
    """A random layer and a random input."""
    replicas = draw.choice([1, 1, 2])
    samples = replicas * draw.choice([2, 3, 5])
    positions = draw.choice([[], [40], [7, 7], [5, 9], [2, 3, 4], [33, 5], [47, 47]])  # the last: up to 35 parts
    if norm == "in" and not positions:
        positions = [6]
    with_residual = draw.random() < 0.4
    return {
        "norm": norm,
        "options": options_of(norm, draw),
        "samples": samples,
        "channels": draw.choice([6, 24, 48]),
        "positions": positions,
        "replicas": replicas,
        "deferred": replicas > 1 or draw.random() < 0.5,
        "tokens": draw.random() < 0.3,
        "channels_last": draw.random() < 0.5,
        "residual": with_residual,
        "act": draw.choice([None, "relu"] if with_residual else [None, *ops.ACTIVATIONS]),
        "training": draw.random() < 0.75,
        "reordered": draw.random() < 0.3,
        "without_bias": draw.random() < 0.1,
        "dtype": draw.choice(list(DTYPES)),
        "offset": draw.choice([0.0, 3.0, 30.0]),
    }


def layer_of(case: dict[str, object]) -> nn.Module:
    channel_dim = -1 if case["tokens"] else 1
    layer = norm_class(str(case["norm"]))(
        case["channels"], act=case["act"], channel_dim=channel_dim, **case["options"]  # type: ignore[arg-type]
    )  # fmt: skip
    randomize(layer)
    if case["reordered"] and layer.weight is not None:  # as after a parametrization was removed
        layer._parameters["weight"] = layer._parameters.pop("weight")
    if case["without_bias"]:
        layer.bias = None
    return layer.train(bool(case["training"]))


def run(case: dict[str, object], layer: nn.Module, backend: str, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output, gradients and buffers of a forward, a backward and a commit."""
    ops.set_backend(backend)
    if case["deferred"]:
        configure_scope(layer, replicas=int(str(case["replicas"])))
    x, residual, grad = (t.clone(memory_format=torch.preserve_format) for t in inputs)
    x.requires_grad_()
    residual.requires_grad_()
    y = layer(x, residual if case["residual"] else None)
    y.backward(grad)
    commit_running_stats(layer)
    named = {"y": y, "dx": x.grad, "dresidual": residual.grad, **dict(layer.named_buffers())}
    named |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.detach().double() for name, value in named.items() if value is not None}


def errors_of(case: dict[str, object], *backends: str) -> list[dict[str, float]]:
    """The relative error of every result, in the 2-norm; of gradients that nearly vanish, relative to those of x."""
    torch.manual_seed(0)
    layer, dtype = layer_of(case), DTYPES[str(case["dtype"])]
    shape = [case["samples"], case["channels"], *case["positions"]]  # type: ignore[misc]
    inputs = [torch.randn(shape) + offset for offset in (float(str(case["offset"])), 0.0, 0.0)]
    if case["tokens"]:
        inputs = [t.movedim(1, -1).contiguous() for t in inputs]
    elif case["channels_last"] and len(shape) == 4:
        inputs = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
    inputs = [t.to(dtype) for t in inputs]
    exact = run(case, copy.deepcopy(layer).double(), "eager", [t.double() for t in inputs])
    floor = 1e-2 * float(exact["dx"].norm())
    rows = []
    for backend in backends:
        found = run(case, copy.deepcopy(layer), backend, inputs)
        assert exact.keys() == found.keys()
        rows.append(
            {
                name: float((found[name] - value).norm()) / max(float(value.norm()), floor, 1e-6)
                for name, value in exact.items()
            }
        )
    return rows


def change_is_noticed(norm: str) -> bool:
    """Whether autograd refuses a backward through running statistics that a later forward has moved."""
    ops.set_backend("triton")
    layer = norm_class(norm)(6).eval()
    y = layer(torch.randn(4, 6, 5, requires_grad=True))
    layer.train()(torch.randn(4, 6, 5))
    try:
        y.sum().backward()
    except RuntimeError as problem:
        return "inplace" in str(problem)
    return False


def main() -> None:
    for norm in ("sn", "en"):
        missed = float(not change_is_noticed(norm))
        print(json.dumps({"case": {"dtype": "float32", "norm": norm}, "error": missed, "eager": 0.0}))
    draw = random.Random(int(sys.argv[1]))
    for norm in NORMS:
        for _ in range(int(sys.argv[2])):
            case = case_of(norm, draw)
            errors, eager = errors_of(case, "triton", "eager")
            worst = max(errors, key=lambda name: errors[name])
            row = {"case": case, "worst": worst, "error": errors[worst], "eager": eager[worst]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Layers under `torch.compile` on the Triton back end, run by Triton's interpreter: a row for each of random layers.

    python tests/triton_operators.py SEED LAYERS_OF_EACH_NORM
    python tests/triton_operators.py formula                    what the operator leaves to the formula
    python tests/triton_operators.py twice                      layers that get one tensor twice
    python tests/triton_operators.py trainings                  trained with torch's own compiler, and without

A process of its own, since TRITON_INTERPRET must be set before the first import of Triton.
"""

import copy
import json
import os
import random
import sys
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from triton_interpreted import case_of, layer_of

from exnorm import ops
from exnorm.config.errors import UserError
from exnorm.norms import commit_running_stats, configure_scope
from exnorm.norms.fused.layer import serves
from exnorm.surgery import norm_class


def results(layer: nn.Module, net: Any, inputs: list[Tensor], *, residual: bool) -> dict[str, Tensor]:
    """Output, gradients and buffers of a forward and a backward of `net`, which runs `layer`."""
    x, added, grad = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    y = net(x, added if residual else None)
    y.backward(grad.detach())
    tensors = {"y": y, "dx": x.grad, "dresidual": added.grad}
    tensors |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return {name: t.detach() for name, t in tensors.items() if t is not None} | buffers


def row_of(case: dict[str, Any]) -> dict[str, Any] | None:
    """What differs between a compiled layer and the same layer called directly; None if it cannot be."""
    torch.manual_seed(0)
    layer: Any = layer_of({**case, "reordered": False})
    shape = [case["samples"], case["channels"], *case["positions"]]
    inputs = [torch.randn(shape) for _ in range(3)]
    if case["tokens"]:
        inputs = [t.movedim(1, -1).contiguous() for t in inputs]
    other = copy.deepcopy(layer)
    for each in (layer, other):
        if case["deferred"]:
            configure_scope(each, replicas=case["replicas"])
    if not serves(layer, inputs[0]):
        return None
    try:
        layer.check_input(inputs[0])
    except UserError:
        return None
    operators: list[str] = []

    def keep(graph: fx.GraphModule, example: Any) -> Any:
        for node in graph.graph.nodes:  # an operator that changes its inputs is an argument of another one
            operators.extend(str(each) for each in (node.target, *node.args[:1]) if str(each).startswith("exnorm."))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    net = torch.compile(other, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    direct = results(layer, layer, inputs, residual=case["residual"])
    compiled = results(other, net, inputs, residual=case["residual"])
    equal = [name for name, value in direct.items() if torch.equal(value, compiled[name])]
    return {"case": case, "differ": sorted({*direct, *compiled} - {*equal}), "operators": operators}


def left_to_the_formula(norm: str) -> dict[str, Any]:
    """What the operator must not take: the error under torch.compile, and the operators of an exported program."""
    x = torch.randn(4, 32, 5, 5)
    strided = norm_class(norm)(32, act="relu")
    size = strided.weight.numel()
    strided.weight = nn.Parameter(torch.randn(2 * size)[::2].view(strided.weight.shape))
    assert not strided.weight.is_contiguous()
    torch._dynamo.reset()
    compiled = torch.compile(strided, fullgraph=True, backend="aot_eager")
    errors = {"strided weight": float((strided(x) - compiled(x)).abs().max())}
    layer = norm_class(norm)(32, act="relu").eval()
    gradient = torch.func.grad(lambda x: layer(x).square().sum())
    errors["func.grad"] = float((torch.compile(gradient, fullgraph=True, backend="aot_eager")(x) - gradient(x)).norm())
    program = torch.export.export(layer, (x,))
    exported = {str(node.target) for node in program.graph.nodes if "exnorm.layer" in str(node.target)}
    return {"norm": norm, "errors": errors, "exported": sorted(exported)}


class Block(nn.Module):
    """Two layers, the second one with a residual."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(norm_class(norm)(16, act="relu") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[0](self.convs[0](x))
        return self.norms[1](self.convs[1](inner), x)


def training(norm: str, *, deferred: bool, frozen: bool) -> dict[str, Any]:
    """How far a compiled block and the same block are apart after steps with inputs of several sizes."""
    torch.manual_seed(0)
    block = Block(norm)
    if deferred:
        configure_scope(block, replicas=2)
    for parameter in block.norms.parameters():
        parameter.requires_grad_(not frozen)
    other = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True)
    sizes = [(4, 5), (6, 5), (4, 7), (2, 6)]
    batches = [torch.randn(samples, 16, pixels, pixels) for samples, pixels in sizes]
    for model, net in ((block, block), (other, compiled)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for x in batches:
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if deferred:
                commit_running_stats(model)
    state, others = block.state_dict(), other.state_dict()
    with torch.no_grad():
        errors = {"training": float((block(batches[3]) - compiled(batches[3])).abs().max())}
        for each in (block, other):
            each.eval()
        errors["evaluation"] = float((block(batches[3]) - compiled(batches[3])).abs().max())
    errors |= {name: float((value - others[name]).abs().max()) for name, value in state.items()}
    return {"norm": norm, "deferred": deferred, "frozen": frozen, "errors": errors}


class Twice(nn.Module):
    """A layer whose residual is its own input; with SN also two parameters that are one."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm: Any = norm_class(norm)(16, act="relu")
        if norm == "sn":
            self.norm.var_weight = self.norm.mean_weight

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        inner = x.sin()
        return self.norm(inner, inner) + self.norm(x, residual)


def same_tensor_twice(norm: str) -> dict[str, Any]:
    """How far the gradients are apart if a layer gets one tensor twice, also after a call with two tensors."""
    torch.manual_seed(0)
    layer = Twice(norm)
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x, y = (torch.randn(4, 16, 5, 5) for _ in range(2))
    grads = []
    for net, model in ((layer, layer), (compiled, other)):
        inputs = [t.clone().requires_grad_() for t in (x, y)]
        net(*inputs).square().sum().backward()
        net(inputs[0], inputs[0]).square().sum().backward()
        grads.append([t.grad for t in (*inputs, *model.parameters())])
    errors = [float((one - two).norm() / one.norm()) for one, two in zip(*grads, strict=True)]
    return {"norm": norm, "error": max(errors)}


def main() -> None:
    ops.set_backend("triton")
    if sys.argv[1] == "formula":
        for norm in ("bn", "gn", "sn", "en"):
            print(json.dumps(left_to_the_formula(norm)), flush=True)
        return
    if sys.argv[1] == "twice":
        for norm in ("bn", "gn", "sn", "en"):
            print(json.dumps(same_tensor_twice(norm)), flush=True)
        return
    if sys.argv[1] == "trainings":
        for norm, deferred, frozen in (("bn", True, False), ("gn", False, True), ("en", True, False)):
            print(json.dumps(training(norm, deferred=deferred, frozen=frozen)), flush=True)
        return
    draw = random.Random(int(sys.argv[1]))
    for norm in ("bn", "gn", "ln", "in", "sn", "en"):
        left = int(sys.argv[2])
        while left:
            row = row_of(case_of(norm, draw))
            if row is not None:
                print(json.dumps(row), flush=True)
                left -= 1


if __name__ == "__main__":
    main()

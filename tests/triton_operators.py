"""Layers under `torch.compile` on the Triton back end, run by Triton's interpreter: a row for each of random layers.

    python tests/triton_operators.py SEED LAYERS_OF_EACH_NORM
    python tests/triton_operators.py                            what the operator leaves to the formula

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
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from triton_interpreted import case_of, layer_of

from exnorm import ops
from exnorm.config.errors import UserError
from exnorm.norms import configure_scope
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

    def compiler(graph: fx.GraphModule, example: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes if "exnorm" in str(node.target))
        return aot_eager(graph, example)

    torch._dynamo.reset()
    net = torch.compile(other, fullgraph=True, backend=compiler)
    direct = results(layer, layer, inputs, residual=case["residual"])
    compiled = results(other, net, inputs, residual=case["residual"])
    buffers = dict(layer.named_buffers())
    close = [name for name in buffers if torch.allclose(direct[name], compiled[name], rtol=1e-5, atol=1e-6)]
    equal = [name for name, value in direct.items() if torch.equal(value, compiled[name])]
    return {"case": case, "differ": sorted({*direct, *compiled} - {*close, *equal}), "operators": operators}


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


def main() -> None:
    ops.set_backend("triton")
    if len(sys.argv) == 1:
        for norm in ("bn", "gn", "sn", "en"):
            print(json.dumps(left_to_the_formula(norm)), flush=True)
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

"""The formats that hold the computation itself: ONNX and `torch.export`. Their files run without exnorm.

The number of images is free. Classification fixes height and width, because the data set does: a network is trained and
validated on one crop. Segmentation leaves them free, because test images come as they are. Its logits have the size of
the head's output, as those of the network have.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from exnorm.config.errors import UserError, first_line
from exnorm.export.exported import Exported, Loaded, write_synced

OPSET = 20  # the default of the exporter in torch 2.15, said here so that it does not change with torch
INPUT, OUTPUT = "images", "logits"
DESCRIPTION = "exnorm.json"  # in a .pt2 file


def write_onnx(exported: Exported, path: Path) -> None:
    """Write an ONNX file, up to 2 GB, with the description as `metadata_props`."""
    with _explained(exported, "torch.onnx.export"):
        program: Any = torch.onnx.export(
            exported.model,
            (exported.example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=_free_sizes(exported),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with paths of this machine
        program.model.graph.metadata_props.clear()
        program.model.metadata_props.update(exported.description)
        content = program.model_proto.SerializeToString()
    write_synced(path, content)


def read_onnx(path: Path) -> Loaded:
    """Return the network in an ONNX file, which onnxruntime runs on the CPU."""
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    opset = next(entry.version for entry in onnx.load(path).opset_import if not entry.domain)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return Loaded(run, f", opset {opset}")


def write_program(exported: Exported, path: Path) -> None:
    """Write an exported program of torch, with the description as an extra file."""
    content = io.BytesIO()
    with _explained(exported, "torch.export"):
        program = torch.export.export(exported.model, (exported.example,), dynamic_shapes=_free_sizes(exported))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, content, extra_files={DESCRIPTION: json.dumps(exported.description, indent=2)})
    write_synced(path, content.getvalue())


def read_program(path: Path) -> Loaded:
    """Return the network in a file of `torch.export`."""
    return Loaded(torch.export.load(path).module())


def _free_sizes(exported: Exported) -> Any:
    free = {0: Dim("batch", min=1)}
    if exported.smallest is not None:
        free |= {2: Dim("height", min=exported.smallest), 3: Dim("width", min=exported.smallest)}
    return (free,)


@contextmanager
def _explained(exported: Exported, exporter: str) -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        reason = first_line(problem.__cause__ or problem)  # the ONNX exporter puts advice of its own around it
        raise UserError(
            f"{exporter} cannot export {exported.name} ({reason}). Type --format safetensors to export the weights"
        ) from problem

"""Run the notebooks of `examples/` and store their outputs: `make notebooks`.

A notebook runs in a new process and in an empty folder, so it sees no files and no state of an earlier run. The stored
metadata has no times of execution and no version of the kernel, which change from run to run.
"""

import hashlib
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TIMEOUT_S = 600  # of a cell: a hang, not a slow machine
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(file: Path) -> NotebookNode:
    """Return a notebook."""
    return nbformat.read(file, as_version=4)


def executed(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook with the outputs of a run, as it is stored.

    Raises:
        CellExecutionError: a cell raised an exception.
    """
    ran = normalized(notebook)
    with TemporaryDirectory() as kernel, TemporaryDirectory() as folder:
        manager = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # this interpreter, not what a user registered
            connection_file=str(Path(kernel) / "kernel.json"),
            transport="ipc",  # sockets in that folder: no ports
        )
        client = NotebookClient(
            ran,
            km=manager,
            timeout=TIMEOUT_S,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(cleanup_kc=True, env=environment(Path(kernel)))
    return normalized(ran, source=source_hash(ran))


def environment(profile: Path) -> dict[str, str]:
    """Return the variables of the kernel: this checkout's exnorm, and no profile of the user."""
    kept = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}  # figures belong in the notebook
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "IPYTHONDIR": str(profile)}


def normalized(notebook: NotebookNode, *, source: str | None = None) -> NotebookNode:
    """Return a copy with only the metadata that the project stores. `source` is the hash that the outputs belong to."""
    metadata = METADATA | ({"exnorm": {"outputs_of": source}} if source else {})
    copy = nbformat.from_dict({**notebook, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})
    for cell in copy.cells:
        cell.metadata = NotebookNode({key: value for key, value in cell.metadata.items() if key == "tags"})
    return copy


def source_hash(notebook: NotebookNode) -> str:
    """Return a hash of the code of a notebook. Its outputs do not depend on the text between."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def main() -> int:
    """Run all notebooks and write them; return 1 if one of them printed to stderr."""
    failed = 0
    for file in NOTEBOOKS:
        start = time.perf_counter()
        notebook = executed(read(file))
        nbformat.write(notebook, file)
        noise = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if is_stderr(output)]
        failed |= bool(noise)
        print(f"{file.relative_to(ROOT)}: {time.perf_counter() - start:.0f} s, {file.stat().st_size / 1e3:.0f} kB")
        print(*noise, sep="", end="", file=sys.stderr)
    return failed


def is_stderr(output: NotebookNode) -> bool:
    """Return whether an output is text that a cell printed to stderr."""
    return output.output_type == "stream" and output.name == "stderr"


if __name__ == "__main__":
    sys.exit(main())

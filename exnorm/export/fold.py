"""`exnorm fold`: fold layers of a trained model into its convolutions, check the outputs, and write the result."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from exnorm import ops
from exnorm.export.check import Agreement, CheckFailed, Sample, batches, compare
from exnorm.export.exported import Exported
from exnorm.export.write import Format, agreement, chosen_format, new_target, trained, write_checked
from exnorm.runs.folder import RunFolder
from exnorm.runs.table import print_table
from exnorm.surgery import Audit, audit, fold
from exnorm.surgery.folded import Folded


@dataclass(frozen=True)
class FoldedRun:
    """The model of a run before and after folding.

    Attributes:
        before: the trained model.
        after: the same with the folded model; its description also has the entry `folded`.
        rows: of the audit of the folded model.
        images: for the checks.
        found: how much the two models agree on these images.
        chosen: the format to write.
        target: the file to write.
    """

    before: Exported
    after: Exported
    rows: Audit
    images: Sample
    found: Agreement
    chosen: Format
    target: Path


def fold_run(run_path: Path, form: str, *, at: str, out: Path | None) -> FoldedRun:
    """Fold the model of a run and compare it with the model before.

    Args:
        form: torch_export or onnx; the other formats hold weights of the model before.
        at: the checkpoint: last, best or a file.
        out: the file to write; None for `folded` with the format's ending in the run's folder `export`.

    Raises:
        UserError: a package, a run or a checkpoint is missing, the file exists, or no layer can be folded.
        CheckFailed: the outputs before and after do not agree.
    """
    chosen = chosen_format(form)
    folder = RunFolder(run_path)
    target = new_target(folder, f"folded{Path(chosen.name).suffix}", out, is_folder=False)
    before, images = trained(folder, at)
    model = fold(copy.deepcopy(before.model))
    folded = [name for name, module in model.named_modules() if isinstance(module, Folded)]
    after = replace(before, model=model, description={**before.description, "folded": json.dumps(folded)})
    try:
        with ops.using_backend("eager"):
            found = compare(model, before.model, batches(images.images, before.smallest))
    except CheckFailed as problem:
        raise CheckFailed(f"the folded model is another function, and is not written: {problem}") from None
    return FoldedRun(before, after, audit(model), images, found, chosen, target)


def print_report(run: FoldedRun) -> None:
    """Print what happened to each layer, and how much the outputs differ."""
    table = Table("layer", "is now", "why", box=None, pad_edge=False)
    for row in run.rows:
        table.add_row(row.name, escape(row.replacement or row.original), escape(row.reason))
    print_table(table)
    folded = len(json.loads(run.after.description["folded"]))
    print(f"{folded} of {len(run.rows)} layers are folded. {agreement(run.images, run.found)}")


def write_folded(run: FoldedRun) -> str:
    """Write the folded model, compare the file with the model before folding, and return a line about it.

    Raises:
        UserError: the format cannot hold the model.
        CheckFailed: what was written does not agree with the model. It is removed.
    """
    return write_checked(run.after, run.chosen, run.target, run.images, run.before.model)

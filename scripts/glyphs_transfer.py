"""A ResNet with BN, SN and EN trained on `glyphs` and on `glyphs_web`, each tested on both, with 3 seeds.

    python scripts/glyphs_transfer.py [--runs DIR] [--collect]

Eighteen runs, about an hour on 2 cores; a finished one is not run again, and one that was killed goes on. Writes
`results/records/glyphs-transfer.csv`, a row for each run and test set, and `results/tables/glyphs-transfer.md`.
`--collect` writes the two from the runs that there are. The setting was chosen on BN alone and on another seed
(`exnorm/data/glyphs.py`).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from exnorm.diagnostics.bench import markdown
from exnorm.runs.folder import RunFolder, read_json

NORMS = ("bn", "sn", "en")
SETS = ("glyphs", "glyphs_web")
SEEDS = (0, 1, 2)
SETTING = "model=resnet_mini batch=8x32 trainer.epochs=13 optim.lr_per_256=0.3 optim.warmup=0.1 logger=off"
RESULTS = Path("results")


def main() -> None:
    """Run what is missing, then write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder for the run folders")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.collect:
        train(options.runs)
    rows = [row for folder in sorted(options.runs.glob("glyphs*/*")) for row in rows_of(RunFolder(folder))]
    if not rows:
        parser.error(f"no finished runs in {options.runs}")
    write(pd.DataFrame(rows))


def train(runs: Path) -> None:
    """Both sets at once, each on one core."""
    sweep = [sys.executable, "-m", "exnorm", "train", "-m", *SETTING.split(), f"data.val=[{','.join(SETS)}]"]
    sweep += [f"norm={','.join(NORMS)}", f"seed={','.join(map(str, SEEDS))}", f"runs={runs}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*sweep, f"data={name}"], env=environment) for name in SETS]
    if any([process.wait() for process in started]):  # noqa: C419  # both are waited for
        sys.exit("a sweep failed; the same command goes on with the runs that are missing")


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """A row for each test set of a finished run of this study."""
    record, provenance = folder.read_record(), read_json(folder.provenance_file)
    if record is None or provenance is None or not all(f"val/{name}/top1" in record for name in SETS):
        return []
    config = folder.read_config()
    facts = {"train_on": config["data"]["name"], "norm": config["norm"]["name"], "seed": config["seed"]}
    origin = {
        "updates": record["steps"],
        "hours": round(record["hours"], 4),
        "noisy_labels": record.get("noise", {}).get("wrong_labels", 0),
        "ratio": json.dumps({name: round(share, 3) for name, share in record["ratio"].items()}),
        "run": folder.path.name,
        "config_hash": provenance["config_hash"],
        "commit": (provenance["git"] or {}).get("commit", ""),
        "uncommitted": bool((provenance["git"] or {}).get("dirty", False)),
        "torch": provenance["versions"]["torch"],
        "device": record["device"],
    }
    scores = (
        {"test_on": name, "top1": record[f"val/{name}/top1"], "top5": record[f"val/{name}/top5"]} for name in SETS
    )
    return [{**facts, **score, **origin} for score in scores]


def write(rows: pd.DataFrame) -> None:
    """The record, and the table: mean ± standard deviation over seeds, and how many seeds there are."""
    rows["norm"] = pd.Categorical(rows["norm"], NORMS)
    rows = rows.sort_values(["train_on", "norm", "seed", "test_on"])
    record, table = RESULTS / "records" / "glyphs-transfer.csv", RESULTS / "tables" / "glyphs-transfer.md"
    for file in (record, table):
        file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(record, index=False)
    scores = rows.groupby(["train_on", "test_on", "norm"], observed=True)["top1"].agg(["mean", "std", "count"])
    cells = scores.apply(lambda cell: f"{cell['mean']:.2f} ± {cell['std']:.2f} ({cell['count']:.0f})", axis=1)
    wide = cells.unstack("norm").reset_index().rename(columns={"train_on": "trained on", "test_on": "tested on"})
    hours = rows.drop_duplicates("run")["hours"].sum()
    lines = [
        "# glyphs and glyphs_web: trained on each, tested on both",
        f"Top-1 in %, mean ± standard deviation (seeds); the last epoch counts. `{SETTING}`; {hours:.1f} hours of "
        f"training in all on {rows['device'].iloc[0]}. A fifth of the training labels of glyphs_web are wrong, those "
        "of validation are clean; validation shows fonts that training did not. A mini scale: nothing here was "
        "measured on ImageNet or WebVision. Made by `python scripts/glyphs_transfer.py` from "
        "`results/records/glyphs-transfer.csv`.",
        markdown(wide.set_index("trained on")),
    ]
    table.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

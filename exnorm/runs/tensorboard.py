"""TensorBoard files in the run folder. `tensorboard --logdir runs` shows the curves of all runs.

The events are written here and not by `torch.utils.tensorboard`. Its writer works in a thread. There a full disk prints
a traceback, and a kill loses the rows of the last two minutes.
"""
# pyright: reportAttributeAccessIssue=false
# protobuf makes the classes of events when its modules are imported.

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from exnorm.config.errors import UserError
from exnorm.runs.folder import RunFolder, names_file
from exnorm.runs.metrics import MetricsLog, plain

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.summary.writer.record_writer import RecordWriter
except ModuleNotFoundError:
    raise UserError(
        "logger=tensorboard needs the package tensorboard. Type pip install 'exnorm[tensorboard]'"
    ) from None

PURGE_STEP = 0  # TensorBoard drops what it read of a run from this step on


class TensorBoardSink:
    """An event file with a scalar for each metric of each row, and the run's configuration as text.

    Each start makes a new file, with all rows of `metrics.jsonl`, and lets TensorBoard drop the events of earlier
    files. So it shows each row once, also rows that an earlier start could not write. The last earlier file stays,
    because TensorBoard may be reading it. Events have the time at which they were written. NaN and infinity are left
    out.
    """

    def __init__(self, folder: RunFolder, run_config: dict[str, Any]) -> None:
        folder.tensorboard_dir.mkdir(parents=True, exist_ok=True)
        self.path = next_file(folder.tensorboard_dir)
        first = [
            Event(file_version="brain.Event:2"),
            Event(step=PURGE_STEP, session_log=SessionLog(status=SessionLog.START)),
            Event(step=0, summary=Summary(value=[text("config", run_config)])),
        ]
        rows = MetricsLog.read(folder.metrics_file)
        self._append([*first, *(scalars(row, row["step"]) for row in rows)])

    def log(self, row: dict[str, Any], step: int) -> None:
        """Append a row."""
        self._append([scalars(row, step)])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Do nothing: the rows have the ratios of each layer as scalars, `ratio/<layer>/<normalizer>`."""

    def close(self, exit_code: int = 0) -> None:
        """Do nothing: every row is already on disk."""

    def _append(self, events: Iterable[Event]) -> None:
        with names_file(self.path), open(self.path, "ab") as stream:
            for event in events:
                event.wall_time = time.time()
                RecordWriter(stream).write(event.SerializeToString())


def next_file(folder: Path) -> Path:
    """Return the name of a new event file, and remove all earlier ones but the last.

    TensorBoard reads the files of a folder in the order of their names, which have `tfevents` in them.
    """
    earlier = sorted(
        path for path in folder.glob("events.out.tfevents.*.exnorm") if path.name.split(".")[3].isdecimal()
    )
    for path in earlier[:-1]:
        path.unlink()
    number = int(earlier[-1].name.split(".")[3]) + 1 if earlier else 0
    return folder / f"events.out.tfevents.{number:09d}.exnorm"


def scalars(row: dict[str, Any], step: int) -> Event:
    """Return a row's numbers as an event. TensorBoard has the step itself."""
    numbers = {key: value for key, value in plain(row).items() if isinstance(value, int | float) and key != "step"}
    values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
    return Event(step=step, summary=Summary(value=values))


def text(tag: str, values: dict[str, Any]) -> Summary.Value:
    """Return nested values as YAML for TensorBoard's page of texts, which takes Markdown: indented lines are code."""
    lines = OmegaConf.to_yaml(OmegaConf.create(values)).splitlines(keepends=True)
    code = "".join(f"    {line}" for line in lines).encode(errors="replace")
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[code], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)

"""Jobs of several processes on several nodes, started as torchrun and srun start them. Nodes are names here."""

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from engine_cases import (
    WAIT_S,
    assert_same_run,
    checkpoints,
    make_image_folder,
    metrics,
    only_run,
    start_code,
    start_module,
    tiny,
    train_here,
    wait_for,
)
from hypothesis import given
from hypothesis import strategies as st
from process_cases import free_port

from exnorm.engine.job import Place, describe_nodes, first_host, in_replica_order
from exnorm.runs.folder import RunFolder
from exnorm.studies import submit

Process = subprocess.Popen[str]
HOST = socket.gethostname()
LONG = ("trainer.epochs=500", "trainer.checkpoint_every_steps=2", "batch=3x2")


def begin(command: list[str], cwd: Path, variables: Mapping[str, str] = MappingProxyType({})) -> Process:
    """Start `python -m COMMAND` in a folder, which is made if it is missing."""
    cwd.mkdir(exist_ok=True)
    return start_module(command, cwd, variables)


def torchrun(arguments: Sequence[str], cwd: Path, *, nodes: int, each: int) -> list[Process]:
    """Start a launcher of torch for each node, with some processes each."""
    port = free_port()
    return [
        begin(
            ["torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={each}"]
            + ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "exnorm", *arguments],
            cwd,
        )
        for node in range(nodes)
    ]


def srun(arguments: Any, cwd: Path, nodes: Sequence[int], **others: Path) -> list[Process]:
    """Start a process for each task of SLURM.

    Args:
        arguments: of all tasks, or a list for each.
        nodes: the node of each task.
        others: other folders than `cwd`, such as `task1`.
    """
    port = free_port()
    by_task = [arguments] * len(nodes) if isinstance(arguments[0], str) else arguments
    return [
        begin(
            ["exnorm", *by_task[task]],
            others.get(f"task{task}", cwd),
            {
                "SLURM_STEP_NUM_TASKS": str(len(nodes)),
                "SLURM_PROCID": str(task),
                "SLURM_LOCALID": str(nodes[:task].count(node)),
                "SLURM_NODEID": str(node),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_JOB_ID": "1",
                "MASTER_PORT": str(port),
            },
        )
        for task, node in enumerate(nodes)
    ]


def ended(processes: Sequence[Process]) -> list[tuple[int, str, str]]:
    """Wait for all processes; return exit code, stdout and stderr of each."""
    outputs = [process.communicate(timeout=WAIT_S) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def last_step(folder: Path) -> int:
    """Return the step of the last checkpoint of the run in job/, 0 if there is none."""
    return max((RunFolder(path).last_step() or 0 for path in folder.glob("job/runs/*/*")), default=0)


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until the run in job/ has a checkpoint at this step or later."""
    wait_for(lambda: last_step(folder) >= step, f"a checkpoint after step {step}")


def errors(results: Sequence[tuple[int, str, str]]) -> list[str]:
    """Return the lines of exnorm on the stderr of all processes."""
    return [line for _, _, err in results for line in err.splitlines() if line.startswith("exnorm: ")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training images."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.slow
def test_two_nodes_train_the_run_of_one_node(images: Path, tmp_path: Path) -> None:
    """Bit-equal to as many processes on one node, with launchers of torch. One replica spans both nodes."""
    arguments = tiny(images, "batch=1x16")
    alone = train_here([*arguments, "trainer.devices=4"], tmp_path / "alone")
    results = ended(torchrun(arguments, tmp_path / "job", nodes=2, each=2))
    assert [code for code, _, _ in results] == [0, 0], results
    divided = "4 processes on 2 nodes; 1 of 1 replicas is divided between nodes, which exchange BN's statistics"
    assert divided in results[0][1] and results[1][1] == "" and errors(results) == []
    assert_same_run(alone, only_run(tmp_path / "job"))


@pytest.mark.slow
def test_srun_trains_the_run_of_one_node(images: Path, tmp_path: Path) -> None:
    """Bit-equal, also where tasks are dealt out to the nodes in turn. Started again, it prints the result."""
    arguments = tiny(images, "batch=2x8")
    alone = train_here([*arguments, "trainer.devices=4"], tmp_path / "alone")
    for _ in range(2):
        results = ended(srun(arguments, tmp_path / "job", nodes=[0, 1, 0, 1]))
        assert [code for code, _, _ in results] == [0] * 4, results
        assert not any(out for _, out, _ in results[1:]) and errors(results) == []
        assert_same_run(alone, only_run(tmp_path / "job"))
        first, *_ = results[0][1].splitlines()
        assert "4 processes on 2 nodes; each replica is on one node" in first or "has finished" in first


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_one_line_and_the_same_command_resumes(images: Path, tmp_path: Path) -> None:
    arguments = tiny(images, *LONG)
    for killed in (2, 0):
        before = last_step(tmp_path)
        processes = srun(arguments, tmp_path / "job", nodes=[0, 1, 1])
        wait_for_step(tmp_path, before + 2)
        processes[killed].send_signal(signal.SIGKILL)
        results = ended(processes)
        codes = [code for code, _, _ in results]
        assert codes.pop(killed) == -signal.SIGKILL and 0 not in codes, results
        lines = errors(results)
        if killed:
            assert lines[0].startswith(f"exnorm: error: rank 2 on {HOST} ended without a message.")
            assert "the same command resumes the run from the checkpoint after step" in lines[0] and len(lines) == 1
        else:  # a line on each node that is left
            assert set(lines) == {
                f"exnorm: error: rank 0 ended without a message. It was killed, or printed why (seen on {HOST})"
            }
        assert not any("Traceback" in err for _, _, err in results)
    step = last_step(tmp_path)
    processes = srun(arguments, tmp_path / "job", nodes=[0, 1, 1])
    wait_for_step(tmp_path, step + 2)
    processes[2].send_signal(signal.SIGTERM)  # a node is preempted: all stop after the same step, with a checkpoint
    results = ended(processes)
    assert [code for code, _, _ in results] == [143] * 3, results
    assert f"resumed after step {step}" in results[0][1]
    (line,) = errors(results)
    assert line.startswith("exnorm: stopped; the same command resumes the run")


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_resume_the_run(images: Path, tmp_path: Path) -> None:
    """In the same store, where the first processes have left their addresses."""
    arguments = tiny(images, "batch=4x2", "trainer.checkpoint_every_steps=2", "trainer.epochs=6")
    alone = train_here([*arguments, "trainer.devices=2"], tmp_path / "alone")
    command = ["torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "-m", "exnorm", *arguments]
    launcher = begin(command, tmp_path / "job")
    wait_for_step(tmp_path, 2)
    (first, *_) = sorted(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split(), key=int)[1:]
    os.kill(int(first), signal.SIGKILL)
    ((code, out, err),) = ended([launcher])
    assert code == 0, err
    assert "resumed after step" in out
    assert_same_run(alone, only_run(tmp_path / "job"))


@pytest.mark.slow
def test_a_mistake_is_one_line_of_one_process(images: Path, tmp_path: Path) -> None:
    """The others end, too, and nothing is left."""
    for wrong, said in (
        (["batch=3x4"], "does not fit on 2 devices"),
        (["trainer.devices=4"], "trainer.devices=4, but 2 processes were started. Leave trainer.devices out"),
        (["norm=enn"], "did you mean 'en'?"),
        (["-m", "norm=en,bn"], "the processes of a job train one run together"),
        (["optim.lr=1e30"], "the loss is not finite at step"),
    ):
        results = ended(srun(tiny(images, "batch=2x4", *wrong), tmp_path / "wrong", nodes=[0, 1]))
        assert [code for code, _, _ in results] == [2, 2], results
        (line,) = errors(results)
        assert said in line and line in results[0][2], line
    seeds = [[*tiny(images, "batch=2x4"), f"seed={task}"] for task in range(2)]
    results = ended(srun(seeds, tmp_path / "wrong", nodes=[0, 1]))
    assert [code for code, _, _ in results] == [2, 2] and "rank 1 has other settings" in errors(results)[0]
    assert len(list(tmp_path.glob("wrong/runs/*/*"))) == 1  # of the last one, with its error
    (error,) = tmp_path.glob("wrong/runs/*/*/error.txt")
    assert error.read_text().startswith("the loss is not finite at step")


@pytest.mark.slow
def test_a_process_that_fails_is_named_by_the_first_one(images: Path, tmp_path: Path) -> None:
    """The images are missing on the second node."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "images").symlink_to(images)
    (tmp_path / "there").mkdir()
    arguments = [*tiny(Path("images"), "batch=2x4"), f"runs={tmp_path / 'runs'}"]
    results = ended(srun(arguments, tmp_path / "here", nodes=[0, 1], task1=tmp_path / "there"))
    assert [code for code, _, _ in results] == [2, 2], results
    (line,) = errors(results)
    assert line.startswith(f"exnorm: error: rank 1 on {HOST}: ") and "images" in line and line in results[0][2]
    assert not any("Traceback" in err for _, _, err in results)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_stops_before_its_hours_are_over(images: Path, tmp_path: Path) -> None:
    """With a checkpoint, on one machine and in a job. The hours do not belong to the identity of the run."""
    arguments = tiny(images, "trainer.epochs=500", "batch=2x4")
    limited = [*arguments, "trainer.max_hours=0.006"]
    alone = begin(["exnorm", *limited], tmp_path / "job")
    results = [*ended([alone]), *ended(srun(limited, tmp_path / "job", nodes=[0, 1]))]
    assert [code for code, _, _ in results] == [75] * 3, results
    run = only_run(tmp_path / "job")
    assert [line.partition(" from the")[0] for line in errors(results)] == [
        "exnorm: stopped before trainer.max_hours were over; the same command resumes the run"
    ] * 2
    assert "resumed after step" in results[1][1] and checkpoints(run) and not (run / "error.txt").exists()
    assert (run / ".lock").read_text() == ""  # free for other machines at once
    epochs = [row["epoch"] for row in metrics(run) if "val/top1" in row]  # others are at every hundredth step
    assert epochs == list(range(1, len(epochs) + 1)) != []


@pytest.mark.slow
def test_a_submitted_training_has_a_task_for_each_process(images: Path, tmp_path: Path) -> None:
    """On submitit's local cluster. It is the run of as many devices."""
    arguments = tiny(images, "batch=2x4")
    alone = train_here([*arguments, "trainer.devices=2"], tmp_path / "alone")
    local = ["--submit", "cluster=local", "--submit", "tasks_per_node=2", "--submit", "timeout_min=20"]
    ((code, out, err),) = ended([begin(["exnorm", *arguments, *local], tmp_path / "job")])
    assert code == 0 and out.startswith("job ") and "Its output is in" in out, err
    wait_for(lambda: list(tmp_path.glob("job/runs/*/*/record.json")), "the end of the job")
    assert_same_run(alone, only_run(tmp_path / "job"))
    for wrong, said in (
        (["--submit", "tasks=2"], "--submit cluster=local"),
        (["--submit"], "write KEY=VALUE"),
        (["norm=enn", *local], "did you mean 'en'?"),
        (["-m", "norm=en,bn", *local], "--submit queues one training"),
    ):
        ((code, _, err),) = ended([begin(["exnorm", *arguments, *wrong], tmp_path / "job")])
        assert code == 2 and err.count("\n") == 1 and said in err, err


@pytest.mark.slow
def test_a_job_may_train_several_runs_one_after_the_other(images: Path, tmp_path: Path) -> None:
    """As a job of a study that also trains the source of its run. A command that fails ends the job in all tasks."""
    folder = tmp_path / "job" / "runs" / ".submitted"
    words = [*tiny(images, "batch=2x4"), f"runs={tmp_path / 'job' / 'runs'}"]
    executor = submit._executor("several", folder, ["cluster=local", "tasks_per_node=2", "timeout_min=20"])
    commands = [[*words, "seed=1"], [*words, "seed=2"], [*words, "optim.lr=1e30"], [*words, "seed=3"]]
    job = executor.submit(submit.Commands(commands, folder))
    with pytest.raises(Exception, match="returned non-zero exit status 2"):
        job.result()
    seeds = {path.parent.name.rpartition("-")[2] for path in tmp_path.glob("job/runs/*/*/record.json")}
    assert seeds == {"s1", "s2"}
    wait_for(lambda: job._process.poll() is not None, "the end of the other task")
    assert "the loss is not finite" in job.stderr()


STUCK = """
import os, sys, time
from exnorm.engine import lifeline
from exnorm.engine.job import Place
lifeline.GRACE_S = 0.5
rank = int(sys.argv[1])
if rank == 0:
    leader = lifeline.Leader(3)
    print(leader.port, leader.token, flush=True)
    assert [place.rank for place in leader.followers(60)] == [1, 2]
    leader.on_loss = lambda cause: print("noted:", cause, flush=True)
else:
    port, token = sys.argv[2:]
    lifeline.Follower(Place(rank, 3, 0, str(rank), f"host{rank}"), "localhost", int(port), token)
    print("joined", flush=True)
time.sleep(1000)
"""


def test_a_process_that_is_stuck_does_not_outlive_the_loss_of_another_one() -> None:
    """As in an exchange between GPUs, which never returns."""
    leader = start_code(STUCK, "0")
    assert leader.stdout is not None
    address = leader.stdout.readline().split()
    others = [start_code(STUCK, rank, *address) for rank in ("1", "2")]
    for other in others:
        assert other.stdout is not None and other.stdout.readline() == "joined\n"
    with socket.create_connection(("localhost", int(address[0]))) as stranger:
        stranger.sendall(b'{"token": "wrong", "hello": {}}\n')
        assert stranger.recv(1) == b""
    others[0].kill()
    (_, out, err), _, (code, _, silent) = ended([leader, *others])
    cause = "rank 1 on host1 ended without a message. It was killed, or printed why"
    assert leader.returncode == code == 2 and silent == ""
    assert out == f"noted: {cause}\n" and err == f"exnorm: error: {cause}\n"


MANY = """
import resource, sys
from exnorm.engine import lifeline
from exnorm.engine.job import Place
size = 80
if len(sys.argv) == 2:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
    leader = lifeline.Leader(size)
    print(leader.port, leader.token, flush=True)
    print(len(leader.followers(60)), flush=True)
    leader.end({"end": True})
else:
    port, token = sys.argv[1:]
    places = [Place(rank, size, 0, str(rank), "host") for rank in range(1, size)]
    followers = [lifeline.Follower(place, "localhost", int(port), token) for place in places]
    for follower in followers:
        follower.receive()
        follower.done()
"""


def test_a_leader_may_open_a_connection_to_each_process() -> None:
    """Most shells allow 1,024 open files at first, and let a process raise that limit."""
    leader = start_code(MANY, "4096")
    assert leader.stdout is not None
    address = leader.stdout.readline().split()
    (_, out, err), (code, _, _) = ended([leader, start_code(MANY, *address)])
    assert (leader.returncode, out, code) == (0, "79\n", 0), err
    ((_, _, err),) = ended([start_code(MANY, "100")])
    assert "this shell allows 100 (ulimit -H -n), and connections of a job of 80 processes need about" in err


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node07", "node07"),
        ("node[07-09,12]", "node07"),
        ("a,b", "a"),
        ("gpu[1,3]-ib,login", "gpu1-ib"),
        ("rack2-node[001-128]", "rack2-node001"),
    ],
)
def test_the_first_host_of_a_list_of_slurm(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(st.data())
def test_replicas_lie_on_one_node_wherever_they_can(data: Any) -> None:
    """Of every node, as many processes as fit are in replicas of their own; the first process stays the first."""
    span = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    sizes[-1] += -sum(sizes) % span
    names = data.draw(st.permutations([str(node) for node, size in enumerate(sizes) for _ in range(size)]))
    places = [Place(rank, len(names), names[:rank].count(node), node, node) for rank, node in enumerate(names)]
    ordered = in_replica_order(places, span=span)
    assert sorted(ordered, key=lambda place: place.rank) == places and ordered[0].rank == 0
    replicas = [ordered[first : first + span] for first in range(0, len(ordered), span)]
    together = [len({place.node for place in replica}) == 1 for replica in replicas]
    assert sum(together) == sum(size // span for size in sizes)
    assert (describe_nodes(ordered, span=span) == "") == (len(sizes) == 1)
    if span > 1 and len(sizes) > 1:
        assert ("each replica is on one node" in describe_nodes(ordered, span=span)) == all(together)

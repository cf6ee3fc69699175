"""Two hosts under torchrun, and what becomes of them: two network namespaces of this machine, joined by a pair of
virtual interfaces, that share its file system. Needs Linux, root and iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.synthetic import draw_data_set
from tests.dump_cases import SIDE, command, same_bytes
from tests.training_cases import REPOSITORY, steps_of, wait_for_steps

PATIENCE_S = 25
LINE = "error: another process of this training ended or cannot be reached ("


class Host:
    """A namespace with one interface. Whatever runs in it sees no other network."""

    def __init__(self, number: int) -> None:
        self.name, self.link = f"detrcache{number}-{os.getpid()}", f"dc{number}p{os.getpid() % 10**6}"
        self.number, self.address = number, f"10.231.7.{number}"

    def torchrun(self, output: Path, *arguments: object) -> subprocess.Popen[bytes]:
        """`torchrun --nnodes 2 ... -m ARGUMENTS` on this host, with the rendezvous at the first one's address."""
        meet = [
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=10.231.7.1:29500",
            f"--rdzv-conf=is_host={int(self.number == 1)}",
        ]
        run = ["-m", "torch.distributed.run", "--nnodes=2", *meet, f"--local-addr={self.address}", "-m"]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": self.link,
            "OMP_NUM_THREADS": "1",
            "DETRCACHE_PATIENCE_S": str(PATIENCE_S),
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, sys.executable, *run, *map(str, arguments)],
            cwd=REPOSITORY,
            env=environment,
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
        )

    def link_up(self, up: bool) -> None:
        ip("-n", self.name, "link", "set", self.link, "up" if up else "down")

    def kill(self) -> None:
        """Kill everything that runs on this host at once."""
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    first, second = Host(1), Host(2)
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2's `ip`")
    try:
        for host in (first, second):
            ip("netns", "add", host.name)
        ip("link", "add", first.link, "netns", first.name, "type", "veth", "peer", second.link, "netns", second.name)
    except subprocess.CalledProcessError as error:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
        pytest.skip(f"may not make network namespaces: {error.stderr.strip()}")
    for host in (first, second):
        ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link)
        ip("-n", host.name, "link", "set", "lo", "up")
        host.link_up(True)
    yield first, second
    for host in (first, second):
        host.kill()
        ip("netns", "del", host.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hosts: tuple[Host, Host]) -> Path:
    """scenes/, and store.zarr, which the two hosts write together."""
    folder = tmp_path_factory.mktemp("hosts")
    draw_data_set(folder / "scenes", train_images=64, val_images=2, size=SIDE)
    options = [*dump_options(folder), "--out", folder / "store.zarr"]
    processes = [host.torchrun(folder / f"dump-{host.number}.txt", "teacher_dump", *options) for host in hosts]
    for process in processes:
        assert process.wait(180) == 0, (folder / "dump-1.txt").read_text()
    return folder


def dump_options(folder: Path) -> list[object]:
    options = ["--teacher", "random:tiny", "--sizes", "64", "--views", "2", "--device", "cpu", "--workers", "1"]
    return ["--data", folder / "scenes", *options]


def train(hosts: tuple[Host, Host], folder: Path, part: int, *options: object) -> list[subprocess.Popen[bytes]]:
    """The run called `run`, on both hosts; what each prints is in PART-HOST.txt."""
    return [host.torchrun(folder / f"{part}-{host.number}.txt", "student_train", *options) for host in hosts]


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() < begun + seconds
        time.sleep(0.1)


def test_a_dump_of_two_hosts_is_one_hosts(folder: Path, tmp_path: Path) -> None:
    """Every byte of the store that two hosts wrote into a folder that both see against one process's."""
    assert command(*dump_options(folder), "--out", tmp_path / "store.zarr") == 0
    assert same_bytes(folder / "store.zarr", tmp_path / "store.zarr")


def test_a_training_through_a_bad_network(hosts: tuple[Host, Host], folder: Path) -> None:
    """One run, three times. The link is cut for five seconds: no step is made meanwhile, then the run goes on. It is
    cut for good: within the patience the first host ends with the line that says how to go on. Resumed, the second host
    is killed: the first ends with that line at once. Resumed once more, the run comes to its end: every step is there,
    once."""
    first, second = hosts
    run = folder / "run"
    paths = ["--cache", folder / "store.zarr", "--data", folder / "scenes", "--out", folder, "--name", "run"]
    options = "--student tiny --epochs 500 --batch-size 8 --workers 1 --device cpu --eval-every 0 --checkpoint-every 4"
    again = ["--config", run / "run.json", "--resume"]

    processes = train(hosts, folder, 1, *paths, *options.split())
    wait_for_steps(run, 6)
    first.link_up(False)
    time.sleep(1)
    before = len(steps_of(run))
    time.sleep(4)
    assert len(steps_of(run)) <= before + 1
    first.link_up(True)
    wait_for_steps(run, before + 6)
    first.link_up(False)
    wait_until(lambda: LINE in (folder / "1-1.txt").read_text(), PATIENCE_S + 30)
    for process, host in zip(processes, hosts, strict=True):
        host.kill()
        process.wait(10)
    first.link_up(True)

    done = len(steps_of(run))
    processes = train(hosts, folder, 2, *again)
    wait_for_steps(run, done + 6)
    second.kill()
    wait_until(lambda: LINE in (folder / "2-1.txt").read_text(), 30)
    assert processes[0].wait(60) == 1
    assert f"--config {run / 'run.json'} --resume" in (folder / "2-1.txt").read_text()

    last = len(steps_of(run)) + 4
    for process in train(hosts, folder, 3, *again, "--max-steps", last):
        assert process.wait(120) == 0, (folder / "3-1.txt").read_text()
    assert [step["step"] for step in steps_of(run)] == list(range(1, last + 1))

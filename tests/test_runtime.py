"""Which process and which device a command is on, as its environment and --device say."""

from __future__ import annotations

import os

import pytest
import torch

from common.devices import choose_device, start_processes
from common.errors import UserError
from common.runtime import Ranks, read_ranks

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*LAUNCHERS, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ("", Ranks()),
        ("RANK=3 LOCAL_RANK=1 WORLD_SIZE=4", Ranks(3, 1, 4)),
        ("WORLD_SIZE=1", Ranks()),
        ("SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=8", Ranks()),  # a batch script, which srun did not multiply
        ("SLURM_STEP_NUM_TASKS=2 RANK=9 LOCAL_RANK=1 WORLD_SIZE=16", Ranks(9, 1, 16)),  # torchrun on each of two nodes
        ("SLURM_STEP_NUM_TASKS=8 RANK=0 WORLD_SIZE=1", Ranks()),
    ],
)
def test_ranks_of_torchrun(environment: pytest.MonkeyPatch, variables: str, ranks: Ranks) -> None:
    set_all(environment, variables)
    assert read_ranks() == ranks


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("WORLD_SIZE=2", "expected RANK below WORLD_SIZE .* found WORLD_SIZE=2"),
        ("RANK=2 WORLD_SIZE=2", "found RANK=2, WORLD_SIZE=2"),
        ("RANK=1", "found RANK=1"),
        ("RANK=-1 WORLD_SIZE=2", "found RANK=-1"),
        ("RANK=0 WORLD_SIZE=0", "found RANK=0, WORLD_SIZE=0"),
        ("RANK=0 WORLD_SIZE=two", "found RANK=0, WORLD_SIZE=two"),
        ("RANK=0 WORLD_SIZE=", "found RANK=0, WORLD_SIZE="),
        ("SLURM_STEP_NUM_TASKS=8 SLURM_PROCID=3", "srun started this command 8 times"),
        ("OMPI_COMM_WORLD_SIZE=2", "mpirun started this command 2 times"),
        ("PMI_SIZE=4", "mpiexec started this command 4 times"),
    ],
)
def test_processes_that_would_not_know_of_each_other(
    environment: pytest.MonkeyPatch, variables: str, message: str
) -> None:
    set_all(environment, variables)
    with pytest.raises(UserError, match=message):
        read_ranks()


def set_all(environment: pytest.MonkeyPatch, variables: str) -> None:
    for variable in variables.split():
        environment.setenv(*variable.split("=", 1))


def test_no_address_to_meet_at(environment: pytest.MonkeyPatch) -> None:
    """torch would say so in a traceback."""
    assert "MASTER_ADDR" not in os.environ
    with pytest.raises(UserError, match="expected MASTER_ADDR and MASTER_PORT for 2 processes"):
        start_processes(Ranks(0, 0, 2), torch.device("cpu"))


@pytest.mark.parametrize(
    "name",
    [
        "mps",
        "meta",
        "xpu",
        "nope",
        "",
        "-1",
        "cuda:",
        "cuda:x",
        "cuda:01",
        "cuda:99999999999",
        "CPU",
        "cpu:0:0",
        "cpu\n",
    ],
)
def test_no_such_device(name: str) -> None:
    """Also those that torch has and this program does not."""
    with pytest.raises(UserError, match="expected a device such as auto, cpu, cuda or cuda:1, found"):
        choose_device(name)


def test_a_number_is_not_yet_a_device() -> None:
    with pytest.raises(UserError, match="found '0': use cuda:0"):
        choose_device("0")
    assert choose_device("cpu") == torch.device("cpu")

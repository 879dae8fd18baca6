"""Every launcher's environment is a table; contradictions are errors that name the values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.dist.errors import UserError
from undertow.dist.hostlist import expand_counts, expand_hosts
from undertow.dist.launch_env import Launch, detect, port_of

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "run7",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "rack1n[09-11]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-12@1",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def test_plain():
    assert detect({}) == Launch("plain", 0, 1, 0, 1)


def test_torchrun():
    assert detect(TORCHRUN) == Launch(
        "torchrun", 5, 8, 1, 4, "head", 29500, restart_count=2, run_id="run7", node=1, agent_store=True
    )
    assert detect(TORCHRUN).node_rank == 1 and not detect(TORCHRUN).one_host


def test_rank_and_world_size_alone_mean_one_host():
    launch = detect({"RANK": "1", "WORLD_SIZE": "2"})
    assert (launch.local_rank, launch.local_world_size, launch.node_rank, launch.agent_store) == (1, 2, 0, False)


def test_srun():
    launch = detect(SRUN)
    assert (launch.launcher, launch.rank, launch.world_size) == ("srun", 4, 5)
    assert (launch.local_rank, launch.local_world_size, launch.node_rank) == (0, 1, 2)
    assert launch.master_addr == "rack1n09" and launch.run_id == "77.0"
    other_rank = detect(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert other_rank.master_port == launch.master_port and other_rank.local_world_size == 2
    for change in ({"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        assert detect(SRUN | change).master_port != launch.master_port
    given_by_user = detect(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (given_by_user.master_addr, given_by_user.master_port) == ("10.0.0.1", 1234)


def test_srun_on_one_node_uses_loopback():
    launch = detect(SRUN | {"SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "5"})
    assert launch.master_addr == "127.0.0.1" and launch.one_host


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290", "4294967292"])
def test_the_batch_shell_and_other_special_steps_are_plain(step):
    env = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert detect(env if step is None else env | {"SLURM_STEP_ID": step}).launcher == "plain"


def test_open_mpi_and_mpich():
    launch = detect(OPEN_MPI)
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_rank) == ("mpirun", 1, 2, 1)
    assert launch.master_addr == "127.0.0.1" and launch.master_port == detect(OPEN_MPI).master_port > 0
    launch = detect(MPICH)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (2, 4, 0, 2)
    assert launch.master_addr == "" and launch.node_rank == 1  # two hosts, and nobody says which


def test_mpirun_inside_an_allocation_is_mpirun():
    daemon = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    for env in (OPEN_MPI, MPICH):
        assert detect(daemon | env).launcher == "mpirun"
    assert detect(daemon | MPICH).master_addr == "n1" and detect(daemon | MPICH).master_port > 0


def test_slurms_own_pmi_is_srun():
    assert detect(SRUN | {"PMI_RANK": "4", "PMI_SIZE": "5"}).launcher == "srun"


def test_torchrun_under_srun_is_torchrun_even_if_slurm_is_odd():
    assert detect(SRUN | TORCHRUN).launcher == "torchrun"
    assert detect({**SRUN, "SLURM_NTASKS": "?"} | TORCHRUN).launcher == "torchrun"


def test_a_spawner_under_srun_may_make_more_ranks():
    assert detect({**SRUN, "RANK": "9", "WORLD_SIZE": "10"}).rank == 9


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "RANK is set to '0' but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set to '2' but RANK is not set"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "of 9"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "port 70000"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is ''"),
        ({**SRUN, "SLURM_NTASKS": ""}, "SLURM_NTASKS is ''"),
        ({**SRUN, "SLURM_TASKS_PER_NODE": "2(x9)"}, "SLURM_TASKS_PER_NODE is '2"),
        ({**SRUN, "SLURM_TASKS_PER_NODE": "x"}, "SLURM_TASKS_PER_NODE is 'x'"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[1-"}, "SLURM_STEP_NODELIST is"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "rank 0 of 1, but srun says rank 4 of 5"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "2"}, "rank 0 of 2, but mpirun says rank 1 of 2"),
        (OPEN_MPI | MPICH, "Open MPI says rank 1 of 2, MPICH says rank 2 of 4"),
        ({"PMI_RANK": "0"}, "PMI_SIZE is not set"),
    ],
)
def test_malformed_and_contradictory(env, words):
    with pytest.raises(UserError) as caught:
        detect(env)
    assert words in str(caught.value) and caught.value.expected


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("0", False), ("", False), ("False", False)])
def test_disable(value, off):
    for env in ({}, TORCHRUN, SRUN, OPEN_MPI):
        assert detect({**env, "UNDERTOW_DISABLE": value}).disabled is off


def test_host_lists():
    assert expand_hosts("n[1-4,7]") == ["n1", "n2", "n3", "n4", "n7"]
    assert expand_hosts("a,b[08-10],c") == ["a", "b08", "b09", "b10", "c"]
    assert expand_hosts("r[1-2]n[1,3]-ib") == ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]
    assert expand_counts("4(x2),3") == [4, 4, 3]


@pytest.mark.parametrize("text", ["", "n[", "n]1[", "n[1-]", "n[3-1]", "n[[1]]", "a,,b", "n[1-99999999999]", "n[]"])
def test_bad_host_lists(text):
    with pytest.raises(UserError, match="host list"):
        expand_hosts(text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True), st.integers(1, 4))
def test_host_lists_written_plainly_and_compressed_agree(numbers, width):
    names = [f"n{number:0{width}d}" for number in numbers]
    inside = ",".join(f"{number:0{width}d}" for number in numbers)
    assert expand_hosts(",".join(names)) == names == expand_hosts(f"n[{inside}]")


@settings(deadline=None)
@given(st.text())
def test_ports_are_below_the_ephemeral_range(identity):
    assert 1024 < port_of(identity) < 32768

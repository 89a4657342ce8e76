"""How a process learns its place: from torchrun's variables, from Slurm's, or from none."""

import signal
import textwrap

import pytest
from processes import run_words, start_ranks

from src import distributed
from src.distributed import Launch, first_host, read_launch
from src.errors import InputError, run_script

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node3", "MASTER_PORT": "29400"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1003",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PATH": "/bin", "MASTER_ADDR": "node3", "MASTER_PORT": "29400"},  # a job's leftovers, no place in it
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},  # an interactive allocation of one task
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},  # srun of one task
        {"RANK": "", "WORLD_SIZE": "", "SLURM_NTASKS": ""},  # empty is unset
    ],
)
def test_one_process_needs_no_launcher(environ):
    assert read_launch(environ) is None


def test_torchrun_says_everything():
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, "node3", 29400)


def test_torchrun_wins_inside_a_slurm_job():
    assert read_launch({**SLURM, **TORCHRUN}) == Launch(5, 8, 1, "node3", 29400)


def test_slurm_listens_on_the_first_host_of_the_step_at_a_port_made_of_job_and_step():
    assert read_launch(SLURM) == Launch(9, 16, 1, "gpu07", 20000 + (1003 * 16 + 2) % 20000)
    assert 20000 + (1003 * 16 + 2) % 20000 == 36050


def test_slurm_falls_back_on_the_hosts_of_the_job():
    assert read_launch(without(SLURM, "SLURM_STEP_NODELIST")).address == "gpu01"


def test_a_given_address_and_port_replace_those_derived_from_slurm():
    given = read_launch({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (given.address, given.port) == ("10.0.0.1", 1234)
    assert (
        read_launch({**without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "MASTER_ADDR": "a"}).port == 36050
    )


def test_ports_of_steps_side_by_side_differ_and_are_unprivileged():
    ports = {
        read_launch({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in range(9990, 10010)
        for step in range(16)
    }
    assert len(ports) == 320
    assert all(1024 < port < 65536 for port in ports)


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_missing_variable_of_torchrun_is_named(missing):
    with pytest.raises(
        InputError, match=rf"set but {missing} missing: start with torchrun, or unset the variables$"
    ) as error:
        read_launch(without(TORCHRUN, missing))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"set but {missing} missing"):
        read_launch({**TORCHRUN, missing: ""})


def test_only_a_rank_names_all_that_is_missing():
    with pytest.raises(InputError, match=r"^RANK set but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        read_launch({"RANK": "0"})


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"])
def test_a_missing_variable_of_slurm_is_named(missing):
    with pytest.raises(InputError, match=f"set but {missing} missing: start with srun, or unset the variables"):
        read_launch(without(SLURM, missing))


def test_an_allocation_of_many_tasks_without_srun_is_refused():
    with pytest.raises(InputError, match="SLURM_NTASKS set but SLURM_PROCID, SLURM_LOCALID missing: start with srun"):
        read_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})


def test_the_batch_script_itself_is_not_rank_0():
    with pytest.raises(InputError, match="16 tasks, but this process is not one of them: start it with srun"):
        read_launch({**without(SLURM, "SLURM_STEP_ID"), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})


def test_slurm_without_hosts_or_address_is_refused_naming_both():
    with pytest.raises(InputError, match="MASTER_ADDR and SLURM_STEP_NODELIST"):
        read_launch(without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["zero", "-1", "1.5", "4(x2)"])
def test_what_is_no_number_is_quoted(name, value):
    with pytest.raises(InputError, match=rf"^{name} is '") as error:
        read_launch({**TORCHRUN, name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_port_that_cannot_be_is_refused(port):
    with pytest.raises(InputError, match=f"MASTER_PORT is {port}, expected 1 to 65535"):
        read_launch({**TORCHRUN, "MASTER_PORT": port})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "MASTER_PORT"])
def test_what_is_no_number_in_slurm_is_quoted(name):
    with pytest.raises(InputError, match=rf"^{name} is '2\(x3\)'"):
        read_launch({**SLURM, name: "2(x3)"})


@pytest.mark.parametrize("environ", [{**TORCHRUN, "RANK": "8"}, {**SLURM, "SLURM_PROCID": "16"}])
def test_a_rank_outside_the_world_is_refused(environ):
    with pytest.raises(InputError, match=r"^the rank is \d+, expected 0 to \d+"):
        read_launch(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-010,12],login1", "gpu007"),
        ("gpu[3,5-9]", "gpu3"),
        ("gpu[12]", "gpu12"),
        ("a-b-[1-2]", "a-b-1"),
        ("login1,gpu[7-9]", "login1"),
        ("gpu[07-08].cluster.org", "gpu07.cluster.org"),
        ("rack[2-3]node[05-06]", "rack2node05"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_start_without_a_launcher_joins_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *SLURM):
        monkeypatch.delenv(name, raising=False)
    assert distributed.start("cpu").type == "cpu"
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


def test_a_half_set_environment_stops_a_program_with_one_line(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: distributed.start("cpu"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "RANK, WORLD_SIZE set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing" in error


# ---- a rank that dies -----------------------------------------------------------------------------------------------


def run_without_launcher(folder, world_size: int, body: str) -> tuple[list[int], list[str]]:
    """Statuses and standard errors of ranks.py, whose ranks meet and do `body`; nobody ends them when one of them ends."""
    script = folder / "ranks.py"
    head = "import os, signal\nfrom datetime import timedelta\nimport torch\nfrom src import distributed\n"
    head += "from src.errors import InputError, run_script\n"
    head += "distributed.ROLL_CALL = timedelta(seconds=2)\n"
    body = textwrap.indent('distributed.start("cpu")\n' + textwrap.dedent(body), "    ")
    script.write_text(f"{head}def main():\n{body}\nrun_script(main)\n")
    ended = [rank.finish(120) for rank in start_ranks(world_size, run_words, str(script))]
    return [rank.returncode for rank in ended], [rank.stderr for rank in ended]


@pytest.mark.parametrize(("dead", "speaker"), [(1, 0), (0, 1)])
def test_a_dead_rank_is_named_by_the_first_that_is_left(tmp_path, dead, speaker):
    """Without a launcher that ends the others: they end by themselves, at once, with one line."""
    body = f"""
        for step in range(10**6):
            distributed.max_over_ranks(torch.ones(1))
            if (step, distributed.rank()) == (20, {dead}):
                os.kill(os.getpid(), signal.SIGKILL)
        """
    statuses, said = run_without_launcher(tmp_path, 3, body)
    assert statuses == [-signal.SIGKILL if r == dead else 1 for r in range(3)]
    for rank, text in enumerate(said):
        assert ("ranks.py: error: " in text) == (rank == speaker)
        assert "Traceback" not in text
    assert f"rank {dead} of 3 no longer answers: " in said[speaker]


@pytest.mark.parametrize(("wrong", "speaker"), [([0, 1, 2], 0), ([2], 2)])
def test_what_is_wrong_is_said_once_and_by_a_rank_that_knows(tmp_path, wrong, speaker):
    """As where a folder is missing on all hosts, or on one."""
    body = f"""
        if distributed.rank() in {wrong}:
            raise InputError("no such folder")
        distributed.barrier()
        """
    statuses, said = run_without_launcher(tmp_path, 3, body)
    assert [status for rank, status in enumerate(statuses) if rank in wrong] == [2] * len(wrong)
    assert 0 not in statuses
    lines = [line for text in said for line in text.splitlines() if "no such folder" in line]
    assert lines == [f"ranks.py: error{f' on rank {speaker}' if speaker else ''}: no such folder"]


def test_a_rank_that_is_no_number_is_told_so(monkeypatch, capsys):
    for name, value in {"SLURM_PROCID": "x", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        run_script(lambda: distributed.start("cpu"))
    assert "SLURM_PROCID is 'x', expected a number" in capsys.readouterr().err

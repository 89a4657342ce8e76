"""A Slurm of two nodes on this host, for tests: it needs the packages slurm-wlm and munge, and root; no systemd."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo", "squeue", "scancel", "scontrol", "setpriv")
# A user's PATH often lacks the folders of daemons.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

# A requeued job is held back until the credentials of its first start have expired, by default two minutes.
# The GPUs are only numbers: no device stands behind them, so that scripts can ask for some.
# Slurm names 127.0.0.1 and 127.0.0.2 like a cluster's hosts, by a bracketed list, and yet they can be resolved without
# an entry in /etc/hosts: so a rank finds rank 0 as it would on a cluster.
NODES = ("0x7f000001", "0x7f000002")

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
GresTypes=gpu
FirstJobId={first_job}
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """What keeps a cluster from being started here; empty if nothing does."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]
    if missing:
        return f"needs Slurm, of which {', '.join(missing)} are not installed: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "needs root, because slurmd starts tasks as their users"


class SlurmCluster:
    """Two nodes in a temporary folder, from `with` to its end; nothing that was started in between outlives it.

    Attributes:
        environ: what a program needs to reach this cluster. `python` is the one that runs the tests, on one thread.
    """

    def __init__(self, cwd: Path, configuration: str = ""):
        self.cwd, self.extra = cwd, configuration
        self.daemons: list[subprocess.Popen] = []
        self.programs: list[subprocess.Popen] = []

    def __enter__(self) -> "SlurmCluster":
        # Not pytest's folder: the name of a Unix socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environ = {
            **inherited,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), SEARCH]),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }
        try:
            self._start_daemons()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def popen(self, *words: str | Path, **environ: str) -> subprocess.Popen:
        """Start a program such as srun against this cluster."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environ = {**self.environ, **environ}
        self.programs.append(subprocess.Popen(list(map(str, words)), cwd=self.cwd, env=environ, text=True, **pipes))
        return self.programs[-1]

    def run(self, *words: str | Path, timeout: float = 300, **environ: str) -> subprocess.CompletedProcess:
        """Run a program against this cluster to its end."""
        with self.popen(*words, **environ) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def job(self, name: str) -> str:
        """The number of the running job of that name."""
        return self.run("squeue", "--noheader", "--states=RUNNING", "--format=%i", f"--name={name}").stdout.strip()

    def pid(self, job: str, rank: int) -> int:
        """The process of one task; the tasks of the job's first step are spread over the nodes."""
        for node in NODES:
            for line in self.run("scontrol", "listpids", f"{job}.0", node).stdout.splitlines()[1:]:
                pid, _, _, _, task = line.split()
                if task == str(rank):
                    return int(pid)
        raise LookupError(f"job {job} has no rank {rank}")

    def _start_daemons(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # Ranks meet at a port made of the job's number: a random one keeps two clusters on a host apart.
        text = CONFIGURATION.format(
            folder=self.folder, ports=_free_ports(3), nodes=NODES, first_job=random.SystemRandom().randrange(1, 10**6)
        )
        (self.folder / "slurm.conf").write_text(text + self.extra)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        munge_files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "seed", "log")}
        words = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in munge_files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *words)
        self._wait(lambda: munge_files["socket"].exists(), "munged made no socket")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "--states=idle", "--responding", "--format=%D")
        self._wait(lambda: self.run(*idle).stdout.strip() == str(len(NODES)), "the nodes did not become idle")

    def _daemon(self, *words: str) -> None:
        # The signal at the parent's death: when the tests themselves are killed, nobody comes back to stop these.
        with open(self.folder / f"{len(self.daemons)}_{words[0]}.out", "w") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *words],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.daemons.append(process)

    def _wait(self, condition, complaint: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                said = [f"{path.name}: {path.read_text()[-1000:]}" for path in sorted(self.folder.glob("*.out"))]
                raise RuntimeError("\n".join([complaint, *said]))
            time.sleep(0.1)

    def _stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Tasks and their slurmstepds belong to no one here, but carry this cluster's own folder in their environment.
        end = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for program in self.programs:
            program.wait(timeout=10)
            program.stdout.close()
            program.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """Every living process that was started in this cluster's environment, the daemons among them."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has just ended; a zombie's is empty
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]

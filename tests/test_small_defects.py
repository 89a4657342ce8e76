"""How a program ends: closed outputs, signals, folders that cannot be used, and the first lines of the log."""

import contextlib
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from src import checkpoint, distributed
from src.config import method_names, parse_cls_eval, parse_knn_eval, parse_lincls_eval, parse_train, read_method
from src.errors import InputError, run_script
from src.logs import Progress
from src.releases import resolve
from src.run import choose_folder, make_folder, results_folder
from src.stopping import StopRequest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "cls_eval", "knn_eval", "lincls_eval")
NEEDED = {"train": []} | {program: ["--checkpoint", "x"] for program in PROGRAMS[1:]}
SMALL = ["--classes", "10", "--epochs", "2", "--warmup-epochs", "1", "--device", "cpu"]
LONG = "x" * 300
WAIT = "[time.sleep(0.1) for _ in range(600)]"  # one long sleep would miss a signal that comes just before it


@contextlib.contextmanager
def handlers_restored():
    """Restore the signal handlers that training replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def same_handlers():
    with handlers_restored():
        yield


@pytest.fixture
def main_of(monkeypatch):
    """Return the main function of a program, with its command line."""

    def main(program, *words):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, words)])
        return importlib.import_module(program).main

    return main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a small network on digits and return its folder."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as patch, handlers_restored():
        patch.setattr(sys, "argv", ["train.py", *SMALL, "--output-dir", str(folder)])
        importlib.import_module("train").main()
    return folder


def start(*words, **settings):
    """Start a Python process whose outputs can be read."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **settings.pop("environ", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    pipes.setdefault("preexec_fn", signals_heard)
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environ, text=True, **pipes)


def signals_heard():
    """Undo what a shell does to programs in its background: they ignore SIGINT, and so would the program tested here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def script(tmp_path, body):
    """Write a program that gives a function with this body to run_script."""
    head = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom src.errors import run_script\n"
    path = tmp_path / "program.py"
    path.write_text(f"{head}def main():\n{textwrap.indent(textwrap.dedent(body), '    ')}\nrun_script(main)\n")
    return path


# ---- a closed standard output ---------------------------------------------------------------------------------------


def end_with_output(descriptor, *words):
    """Return the exit status and standard error of a process with this standard output."""
    process = start(*words, stdout=descriptor)
    os.close(descriptor)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_into_a_closed_pipe_ends_quietly(program):
    assert end_with_output(without_reader(), f"{program}.py", "--help") == (141, "")


@pytest.mark.parametrize("words", ["flush=True", "flush=False"])
def test_a_print_into_a_closed_pipe_ends_quietly(tmp_path, words):
    path = script(tmp_path, f"for i in range(10000): print('line', i, {words})")
    assert end_with_output(without_reader(), path) == (141, "")
    assert end_with_output(without_reader(), "-u", path) == (141, "")


def test_another_broken_pipe_is_not_hidden(tmp_path):
    status, errors = end_with_output(
        os.open(os.devnull, os.O_WRONLY), script(tmp_path, "raise BrokenPipeError(32, 'gone')")
    )
    assert status == 1
    assert "BrokenPipeError" in errors


def test_an_error_of_the_user_is_shown_although_the_output_is_closed(tmp_path):
    body = "from src.errors import InputError\nprint('unread')\nraise InputError('no such file')"
    assert end_with_output(without_reader(), script(tmp_path, body)) == (2, "program.py: error: no such file\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_on_a_full_disk_is_one_line(tmp_path):
    status, errors = end_with_output(os.open("/dev/full", os.O_WRONLY), script(tmp_path, "print('lost')"))
    assert (status, errors) == (1, "program.py: error: standard output: No space left on device\n")


def test_a_program_without_standard_streams_keeps_their_numbers_free(tmp_path):
    path = script(
        tmp_path, f"print('unseen')\nfile = open({str(tmp_path / 'file')!r}, 'w')\nsys.exit(file.fileno() > 2)"
    )
    done = subprocess.run(f"{shlex.quote(sys.executable)} {path} <&- >&- 2>&-", shell=True, timeout=60)
    assert done.returncode == 1


def test_an_evaluation_into_a_closed_pipe_has_written_its_results(trained, main_of, monkeypatch, tmp_path, capfd):
    main = main_of("cls_eval", "--checkpoint", trained, "--output-dir", tmp_path / "out", "--device", "cpu")
    with os.fdopen(without_reader(), "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            run_script(main)
    assert ended.value.code == 141
    assert capfd.readouterr().err == ""
    assert json.loads((tmp_path / "out" / "cls_eval.json").read_text())["images"] == 360
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("step", [3, 14])  # of 11 steps per epoch
def test_training_saves_when_its_output_is_closed(main_of, monkeypatch, capfd, tmp_path, step):
    reader, writer = os.pipe()

    def close_at(progress, *, at_once=False):
        if progress.done == 128 * step:
            os.close(reader)
        return ("share", "speed") if progress.done >= 128 * step else None

    monkeypatch.setattr(Progress, "_pace", close_at)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            run_script(main_of("train", *SMALL, "--output-dir", tmp_path / "run"))
    assert ended.value.code == 141
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert (saved["epoch"], saved["done"]) == divmod(step + 1, 11)
    last = tmp_path / "run" / "checkpoint.pt"
    line = f"standard output was closed: saved {last} at step {step + 1}; the same command continues from there\n"
    assert capfd.readouterr().err == line


# ---- signals before training ----------------------------------------------------------------------------------------


@pytest.fixture
def slow_import(tmp_path):
    """Return an environment in which the import of torch says so, then takes a minute, and swallows exceptions."""
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "torch.py").write_text(
        "import contextlib, sys, time\n"
        "with contextlib.suppress(BaseException):\n"
        f"    print('importing', file=sys.stderr, flush=True)\n    {WAIT}\n{WAIT}\n"
    )
    return {"PYTHONPATH": str(tmp_path / "stubs")}


def end_by(process, number, *, ready):
    """Send a signal once a process has printed the line `ready` on standard error; return its status and later lines."""
    try:
        assert process.stderr.readline() == f"{ready}\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_while_torch_is_imported_is_one_line(program, number, slow_import):
    process = start(f"{program}.py", *NEEDED[program], environ=slow_import)
    line = f"{program}.py: interrupted by {signal.Signals(number).name}\n"
    assert end_by(process, number, ready="importing") == (128 + number, line)


def test_only_rank_0_prints_the_line(slow_import):
    process = start("train.py", environ={**slow_import, "RANK": "1", "WORLD_SIZE": "2"})
    assert end_by(process, signal.SIGTERM, ready="importing") == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_imports_lets_the_program_clean_up(tmp_path, number):
    body = f"""
    try:
        print("ready", file=sys.stderr, flush=True)
        {WAIT}
    finally:
        open({str(tmp_path / "clean")!r}, "w").close()
    """
    line = f"program.py: interrupted by {signal.Signals(number).name}\n"
    assert end_by(start(script(tmp_path, body)), number, ready="ready") == (128 + number, line)
    assert (tmp_path / "clean").exists()


def test_a_half_built_object_that_fails_while_it_is_deleted_adds_no_line(tmp_path):
    body = f"""
    class Half:
        def __init__(self):
            print("ready", file=sys.stderr, flush=True)
            {WAIT}
        def __del__(self):
            self.missing
    Half()
    """
    line = "program.py: interrupted by SIGTERM\n"
    assert end_by(start(script(tmp_path, body)), signal.SIGTERM, ready="ready") == (128 + signal.SIGTERM, line)


def test_a_forked_process_ends_without_a_line(tmp_path):
    body = f"""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.read(reader, 1)  # until the parent passes signals on
        print("ready", file=sys.stderr, flush=True)
        {WAIT}
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    os.write(writer, b"x")
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert end_by(start(script(tmp_path, body)), signal.SIGTERM, ready="ready") == (128 + signal.SIGTERM, "")


def test_training_takes_the_handlers_over_and_the_caller_gets_its_own_back():
    request = StopRequest()
    before = signal.getsignal(signal.SIGTERM)

    def main():
        assert signal.getsignal(signal.SIGTERM) is not before
        request.listen()
        os.kill(os.getpid(), signal.SIGTERM)

    run_script(main)
    assert request.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_the_caller_ignores_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_script(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_second_interrupt_of_training_is_one_line(capsys):
    def main():
        StopRequest().listen()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err.count("interrupted\n") == 1


# ---- folders and files that cannot be used --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: choose_folder(f"{folder}/{LONG}", fresh=False, name="x"),
        lambda folder: choose_folder(f"{folder}/{LONG}", fresh=True, name="x"),
        lambda folder: results_folder("x.pt", output_dir=f"{folder}/{LONG}"),
        lambda folder: results_folder(f"{folder}/{LONG}", output_dir=""),
        lambda folder: make_folder(folder / LONG),
        lambda folder: make_folder(folder / "file" / "below"),
        lambda folder: resolve(folder / LONG),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_with_the_reason(tmp_path, use):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"File name too long|Not a directory") as error:
        use(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_file_name_that_is_too_long_is_one_line(program, trained, main_of, capfd):
    words = SMALL if program == "train" else ["--checkpoint", trained, "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        run_script(main_of(program, *words, "--output-dir", LONG))
    assert ended.value.code == 2
    message = (
        f"{program}.py: error: --output-dir {LONG}: cannot be examined (File name too long); give another folder\n"
    )
    assert capfd.readouterr().err == message


@pytest.mark.parametrize("program", PROGRAMS[1:])
def test_a_checkpoint_whose_name_is_too_long_is_one_line(program, main_of, capfd):
    with pytest.raises(SystemExit) as ended:
        run_script(main_of(program, "--checkpoint", LONG))
    assert ended.value.code == 2
    assert (
        capfd.readouterr().err
        == f"{program}.py: error: {LONG}: cannot be opened (File name too long); give another file\n"
    )


# ---- the log --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["train", "lincls_eval"])
def test_the_log_begins_with_the_command_and_the_revision(program, trained, main_of, capsys, tmp_path):
    words = SMALL if program == "train" else ["--checkpoint", trained, "--epochs", "1", "--device", "cpu"]
    main_of(program, *words, "--output-dir", tmp_path / "it's a run")()
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"command: {shlex.join(sys.argv)}"
    assert shlex.split(first.removeprefix("command: ")) == sys.argv
    assert second == f"revision: {checkpoint.code_revision()}"


@pytest.mark.parametrize("program", ["train", "lincls_eval"])
def test_other_ranks_do_not_log(program, trained, main_of, capsys, tmp_path, monkeypatch):
    words = SMALL if program == "train" else ["--checkpoint", trained, "--epochs", "1", "--device", "cpu"]
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    main_of(program, *words, "--output-dir", tmp_path / "run")()
    assert capsys.readouterr().out == ""


def test_the_suggested_command_can_be_pasted(main_of, capsys, tmp_path):
    folder = tmp_path / "it's a run"
    main_of("train", *SMALL, "--output-dir", folder)()
    command = capsys.readouterr().out.strip().splitlines()[-1].partition("score it: ")[2]
    assert shlex.split(command) == ["python", "cls_eval.py", "--checkpoint", str(folder / "checkpoint.pt")]


# ---- flags ----------------------------------------------------------------------------------------------------------

UNUSED = [
    (["--patch-size", "8"], "--patch-size", "--arch small_convnet"),
    (["--patch-size", "16"], "--patch-size", "--arch small_convnet"),  # the default, but given
    (["--optimizer", "adamw", "--momentum", "0.8"], "--momentum", "--optimizer adamw"),
    (["--momentum=0.8"], "--momentum", "--optimizer adamw"),  # the optimizer of the preset
]


@pytest.mark.parametrize(("words", "flag", "other"), UNUSED)
def test_a_flag_without_effect_is_refused_with_the_name_of_the_other(words, flag, other):
    with pytest.raises(InputError, match=f"^{flag} has no effect: {other} ") as error:
        parse_train(words)
    assert "\n" not in str(error.value)


def test_it_is_refused_before_torch_is_imported(run_python):
    done = run_python("-X", "importtime", "train.py", "--patch-size", "8")
    assert done.returncode == 2
    assert "train.py: error: --patch-size has no effect" in done.stderr
    assert " torch\n" not in done.stderr


def test_flags_with_an_effect_are_accepted():
    options, _, _ = parse_train(["--arch", "vit_tiny", "--global-crops-size", "8", "--patch-size", "4"])
    assert options.patch_size == 4
    options, _, _ = parse_train(["--optimizer", "sgd", "--momentum", "0.8"])
    assert options.momentum == 0.8


@pytest.mark.parametrize("name", method_names())
def test_presets_may_hold_values_without_effect(name):
    for preset, values in read_method(name).presets.items():
        data = "somewhere" if "eval_size" in values else "digits"  # digits have their own evaluation view
        options, _, _ = parse_train(["--method", name, "--preset", preset, "--data", data])
        assert options.unused().keys() <= {"--patch-size", "--momentum", "--in-memory", "--upright", "--final-lr"}


@pytest.mark.parametrize("words", [["--keep-decoded", "1"], ["--decode-on-gpu"]])
def test_flags_for_image_files_are_refused_for_a_file_of_features(words):
    with pytest.raises(InputError, match=rf"^{words[0]} is for image files, but --data rows\.npz is in memory: drop"):
        parse_train(["--data", "rows.npz", "--arch", "identity", *words])


@pytest.mark.parametrize("parse", [parse_train, parse_cls_eval, parse_knn_eval, parse_lincls_eval])
def test_the_help_states_one_default_for_each_flag(parse, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: )" not in text
    assert "(default: None)" not in text


def test_a_run_ends_although_a_worker_holds_a_copy_of_the_pipe_of_signals(tmp_path):
    body = """
    from src.stopping import StopRequest
    with StopRequest().announced(print, print):
        child = os.fork()
        if not child:
            time.sleep(600)
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, script(tmp_path, body)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

"""The watchdog: who stands where, how the process ends, and what it tells the launcher. A child process a case."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from drpo_megatron.observability.watchdog import EXIT_STALLED, stalls
from drpo_megatron.rollout.state import server_state
from tests.support.servers import wait_until_gone

CHILD = """
    import ctypes, logging, os, subprocess, sys, time
    from pathlib import Path
    from drpo_megatron.observability import VerbTimer, Watchdog
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)

    def waits_in_python():
        time.sleep(600)

    def waits_in_c():
        # A read that never ends. PyDLL keeps the interpreter: no Python code runs meanwhile.
        ctypes.PyDLL(None).getchar()

    def spins_in_c():
        numbers = [0] * 10**6
        while True:
            ctypes.pythonapi.PyList_Sort(ctypes.py_object(numbers))

    def breaks():
        time.sleep({limit} + 1)
        raise RuntimeError("the connection to rank 0 broke")

    def no_states():
        raise OSError("no way to ask")

    def start_child():
        quiet = subprocess.DEVNULL
        child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=quiet, stderr=quiet)
        print(child.pid, flush=True)

    with Watchdog({limit}, {rank}, Path({directory!r})) as watchdog:
        timer = VerbTimer(watchdog.watch)
        {body}
"""


def child(directory: Path, body: str, *, limit: float | None = 1.0, rank: int = 0) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    script = textwrap.dedent(CHILD).format(
        limit=limit, rank=rank, directory=str(directory), body=textwrap.indent(textwrap.dedent(body), "    ").strip()
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        assert process.stdout is not None and process.stderr is not None
        process.wait(timeout=300)  # not communicate(), which would close the stdin that a child may wait on
        output, errors = process.stdout.read(), process.stderr.read()
    return process.returncode, output, errors


STUCK = """
start_child()
watchdog.step = 3
watchdog.server_states = lambda: ["server one: stopped"]
with timer("generate"):
    {where}()
"""


@pytest.mark.parametrize("where", ["waits_in_python", "spins_in_c", "breaks"])
def test_a_stall_is_explained_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    code, output, errors = end_of(child(tmp_path, STUCK.format(where=where)))
    assert code == EXIT_STALLED == os.EX_TEMPFAIL, errors
    stacks = (tmp_path / "stacks_rank_0.txt").read_text()
    assert stacks.startswith("rank 0, step 3, generate: not done after 1 s") and f"in {where}" in stacks
    record = (tmp_path / "error_rank_0.txt").read_text()
    for part in ("step 3, generate", "training.verb_timeout_s = 1 s", "stacks_rank_*.txt", "server one: stopped"):
        assert part in record and part in errors
    assert stalls(tmp_path) == [(0, record.strip())]
    assert wait_until_gone(int(output), timeout_s=300) == []


def test_c_code_that_keeps_the_interpreter(tmp_path: Path) -> None:
    """No Python thread runs then, so that there is no record; the stacks are there, and say it to the launcher."""
    code, output, errors = end_of(child(tmp_path, STUCK.format(where="waits_in_c")))
    assert code == 1, errors
    stacks = (tmp_path / "stacks_rank_0.txt").read_text()
    assert "in waits_in_c" in stacks
    assert not (tmp_path / "error_rank_0.txt").exists()
    [(rank, message)] = stalls(tmp_path)
    assert rank == 0 and "keeps the interpreter" in message and str(tmp_path / "stacks_rank_0.txt") in message
    os.killpg(int(output), signal.SIGKILL)  # a run's own children have PR_SET_PDEATHSIG


def test_a_report_that_cannot_ask_the_servers(tmp_path: Path) -> None:
    body = "watchdog.server_states = no_states\nwith timer('sync'):\n    waits_in_python()"
    code, _, _ = end_of(child(tmp_path, body))
    record = (tmp_path / "error_rank_0.txt").read_text()
    assert code == EXIT_STALLED
    assert "before the first step, sync" in record and "unknown: OSError: no way to ask" in record


def test_another_rank_waits_for_rank_0_and_not_for_ever(tmp_path: Path) -> None:
    """Its first limit writes the stacks; a verb that then ends is none; twice the limit ends it."""
    body = """
    with timer("pack"):
        time.sleep(14)
    watchdog.step = 4
    with timer("train"):
        waits_in_python()
    """
    code, _, errors = end_of(child(tmp_path, body, limit=10.0, rank=1))
    assert code == EXIT_STALLED
    stacks = (tmp_path / "stacks_rank_1.txt").read_text()
    assert "rank 1, before the first step, pack: not done after 10 s" in stacks
    assert "rank 1, step 4, train: not done after 10 s" in stacks
    assert "rank 1, step 4, train: not done after 20 s" in stacks and "in waits_in_python" in stacks
    assert "rank 0 decides" in errors
    record = (tmp_path / "error_rank_1.txt").read_text()
    assert "train: not done after 20 s" in record and "rank 0 did not end the job" in record


def test_verbs_within_the_limit(tmp_path: Path) -> None:
    """Each has the limit for itself, and so has what stands between; the end of the run is none."""
    body = """
    for verb in ("generate", "score", "train"):
        with timer(verb):
            time.sleep(4)
        time.sleep(4)
    """
    code, _, errors = end_of(child(tmp_path, body + "\nprint('done')", limit=20.0))
    assert code == 0, errors
    assert (tmp_path / "stacks_rank_0.txt").read_text() == ""
    between = tmp_path / "between"
    code, _, _ = end_of(child(between, "with timer('sync'):\n    pass\nwaits_in_python()"))
    assert code == EXIT_STALLED and "what follows sync" in (between / "error_rank_0.txt").read_text()


@pytest.mark.parametrize("where", ["waits_in_python", "waits_in_c"])
def test_a_living_rank_shows_its_stacks(tmp_path: Path, where: str) -> None:
    body = f"with timer('train'):\n    print('in', flush=True)\n    {where}()"
    with child(tmp_path, body, limit=None) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        deadline = time.monotonic() + 300
        while f"in {where}" not in (tmp_path / "stacks_rank_0.txt").read_text():
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGUSR2)
            time.sleep(0.2)
        assert process.poll() is None
        process.kill()
    assert stalls(tmp_path) == []


def test_state_of_a_server_that_is_stopped_or_gone(tmp_path: Path) -> None:
    """Any HTTP server that does not know SGLang's requests: what the real one answers is in the end-to-end test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = tmp_path / "server.log"
    log_path.write_text("".join(f"line {n}\n" for n in range(5000)))
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True) as server:
        deadline = time.monotonic() + 300
        while "404" not in "\n".join(server_state("one", url, server.pid, log_path)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.send_signal(signal.SIGSTOP)
        while psutil.Process(server.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lines = server_state("one", url, server.pid, log_path)
        server.kill()
        assert lines[0] == f"one at {url}: /model_info did not answer within 2 s"
        assert "stopped by a signal" in lines[1] and str(server.pid) in lines[1]
        assert lines[-1].strip() == "line 4999" and len(lines) < 15
    gone = server_state("one", url, server.pid, tmp_path / "none")
    assert "no connection" in gone[0] and "no process" in gone[1] and "cannot be read" in gone[-1]
    assert "no process" in server_state("one", url, None, log_path)[1]

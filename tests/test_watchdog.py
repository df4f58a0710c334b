"""What hangs ends, says so, and leaves where it stood; what lives is left alone."""

import subprocess
import sys
import threading

import pytest

from stepkto_fast.watchdog import watchdog

START = "import sys, time, threading, ctypes, pathlib\nfrom stepkto_fast.watchdog import watchdog\n"


def run(block, timeout, log="None"):
    code = START + f"with watchdog({timeout}, 'vLLM, while sampling', {log}) as alive:\n    {block}\nprint('went on')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_a_block_that_hangs_ends_the_process_with_a_message(tmp_path):
    log = tmp_path / "engine.log"
    log.write_text("before\n")
    done = run("threading.Event().wait()", 0.3, f"pathlib.Path({str(log)!r})")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: vLLM, while sampling: no sign of life for 0.3 s (vllm_timeout).")
    assert f"{log} says where it stands. Continue with --resume true" in done.stderr
    assert log.read_text().startswith("before\n")
    assert 'File "<string>", line 4' in log.read_text(), "the line that hangs"


def test_a_call_that_lets_no_other_thread_run_ends_the_process_too():
    done = run("ctypes.PyDLL(None).sleep(50)", 0.3)
    assert done.returncode == 1
    assert done.stdout == ""
    assert 'File "<string>", line 4' in done.stderr


def test_signs_of_life_keep_the_process_and_its_end_is_no_longer_watched():
    done = run("[(alive(), time.sleep(0.1)) for _ in range(15)]\ntime.sleep(1.5)", 0.6)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_nothing_is_left_behind():
    threads = threading.active_count()
    with pytest.raises(KeyError), watchdog(60.0, "a test"):
        raise KeyError
    assert threading.active_count() == threads

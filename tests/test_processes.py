"""Two processes, as on two machines: each sees its own data, both decide alike."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from workers import two_processes


WORKER = pathlib.Path(two_processes.__file__)
TIMEOUT = 300  # seconds; some twenty where nothing else runs
PROCESSES = 2


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(process, port, folder):
    hidden = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"JAX_PLATFORMS": "cpu", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    output, log = folder / f"{process}.npz", folder / f"{process}.log"
    with open(log, "w") as stream:  # a file: a pipe could fill up
        return subprocess.Popen(
            [sys.executable, WORKER, *map(str, (process, PROCESSES, port, output))],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=env,
        )


def wait(children):
    """Until all are done, one has failed, or time is up. Leaves none behind."""
    end = time.monotonic() + TIMEOUT
    try:
        while time.monotonic() < end:
            codes = [child.poll() for child in children]
            if any(codes) or None not in codes:
                return codes
            time.sleep(0.1)
        return [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def run_processes(folder):
    children = []
    port = free_port()
    try:
        children += [start(i, port, folder) for i in range(PROCESSES)]
    finally:
        codes = wait(children)
    return codes, [(folder / f"{i}.log").read_text() for i in range(PROCESSES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    for attempt in range(3):
        folder = tmp_path_factory.mktemp(f"processes{attempt}")
        codes, logs = run_processes(folder)
        if not any("address already in use" in log.lower() for log in logs):
            break  # else somebody was faster to take the free port
    assert codes == [0] * PROCESSES, "\n".join(log[-3000:] for log in logs)
    return [dict(np.load(folder / f"{i}.npz")) for i in range(PROCESSES)]


RUNS = {"by_compiler": two_processes.by_compiler, "by_hand": two_processes.by_hand}


def in_one_process(run, **kwargs):
    mesh = two_processes.make_mesh(jax.devices()[:PROCESSES])
    batches = [two_processes.batch_of(i) for i in range(PROCESSES)]
    return run(mesh, np.concatenate(batches, axis=1), **kwargs)


@pytest.mark.parametrize("run", RUNS)
def test_processes_agree(results, run):
    one, other = (
        {k.split("/")[1]: v for k, v in r.items() if k.startswith(f"{run}/")}
        for r in results
    )
    assert set(one) == {"quotas", *two_processes.SHAPES}
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    quotas = one["quotas"][0]
    assert quotas.shape == (two_processes.STEPS, len(two_processes.SHAPES))
    assert quotas[0].min() < quotas[0].max()
    assert (quotas[0] != quotas[-1]).any()  # two cycles, two allocations
    alone = in_one_process(RUNS[run])
    np.testing.assert_array_equal(alone["quotas"][0], quotas)
    for name in two_processes.SHAPES:
        np.testing.assert_allclose(alone[name][0], one[name][0], rtol=1e-4, atol=1e-6)


def test_they_would_not_agree_without_axis_name():
    """That is, the data differ enough for the test before this one to fail."""
    one, other = in_one_process(two_processes.by_hand, axis_name=None)["quotas"]
    assert (one != other).any()


def test_no_child_is_left_behind(tmp_path, monkeypatch):
    """A process that waits in vain for the other is ended, and the failure is seen."""
    waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert 3 in wait([waiting, failing])
    assert waiting.poll() is not None
    slow = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(sys.modules[__name__], "TIMEOUT", 0.2)
    assert wait([slow]) == [None]
    assert slow.poll() is not None

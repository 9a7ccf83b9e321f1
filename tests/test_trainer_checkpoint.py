"""Killed at any moment and resumed, a run ends with the bits of one left alone."""

import contextlib
import errno
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from priorityprop_jax import ArrayLoader, PriorityPropTrainer
from priorityprop_jax.training import load_report
from priorityprop_jax.training._checkpoint_files import find_steps, newest


WORKER = pathlib.Path(__file__).parent / "workers" / "trainer_process.py"
PATIENCE = 300.0  # seconds for a process


class Blow(NamedTuple):
    """A signal to a process, some time after its n-th save began; n=0: after it did."""

    saves: int
    seconds: float
    kind: signal.Signals = signal.SIGKILL


def start(directory, output, *options):
    command = [sys.executable, str(WORKER), str(directory or ""), str(output), *options]
    hidden = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"JAX_PLATFORMS": "cpu", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def folders(directory):
    """Of checkpoints, begun ones included: their steps, and which folders they are.

    A checkpoint that is complete is the same folder, renamed.
    """
    found = set()
    if directory.exists():
        for entry in os.scandir(directory):
            step = entry.name.partition(".")[0]
            if step.isdecimal():
                found.add((int(step), entry.inode()))
    return found


def strike(process, directory, blow, before):
    """Waits for the moment, and sends the signal unless the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while len(folders(directory) - before) < blow.saves:
        if process.poll() is not None:
            return
        assert time.monotonic() < deadline, "the process saves nothing"
        time.sleep(0.0005)
    time.sleep(blow.seconds)
    process.send_signal(blow.kind)


def run_with_blows(directory, output, blows, *options):
    """Starts processes until one has come to the end: what became of each of them."""
    ends = []
    for blow in [*blows, None]:
        before = folders(directory)
        process = start(directory, output, *options)
        try:
            if blow is not None:
                strike(process, directory, blow, before)
            out, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        latest = max(find_steps(directory), default=None)
        # The newest one is whole, whatever happened: none had to be passed over.
        good, damaged = newest(directory, arrays=True)
        assert not damaged and (good and good.step) == latest
        left = any("tmp" in x.name for x in directory.iterdir()) if latest else False
        assert errors == ""
        if process.returncode == -signal.SIGKILL:
            assert blow.kind == signal.SIGKILL
            ends.append("killed in a save" if left else "killed")
            continue
        assert process.returncode == 0
        _, why, step = out.split()
        assert int(step) == latest  # saved where it ended
        ends.append(why)
        if why == "None":
            break
        assert why == "SIGTERM" and blow.kind == signal.SIGTERM
    return ends


def same_bits(one, other):
    with np.load(one) as a, np.load(other) as b:
        assert sorted(a) == sorted(b)
        assert any("params" in x or x.startswith("[0]") for x in a)
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert a[name].tobytes() == b[name].tobytes(), name


def check(tmp_path, blows, *options):
    """Runs with the blows, next to a run that never saves and is left alone."""
    alone = start(None, tmp_path / "alone.npz", *options)
    directory = tmp_path / "checkpoints"
    try:
        ends = run_with_blows(directory, tmp_path / "resumed.npz", blows, *options)
        out, errors = alone.communicate(timeout=PATIENCE)
    finally:
        alone.kill()
    assert (out.split()[1], errors) == ("None", "")
    same_bits(tmp_path / "alone.npz", tmp_path / "resumed.npz")
    return ends


def test_killed_and_resumed(tmp_path):
    """In its first save, asked to stop, and some time after a save began."""
    blows = [Blow(1, 0.0), Blow(2, 0.01, signal.SIGTERM), Blow(3, 0.05)]
    ends = check(tmp_path, blows)
    assert len(ends) == 4 and all(x.startswith("killed") for x in (ends[0], ends[2]))
    assert (ends[1], ends[3]) == ("SIGTERM", "None")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_many_moments(seed, tmp_path):
    """Three saves at most to a life, and sometimes none: there are some ten lives."""
    rng = random.Random(seed)
    early = [Blow(0, rng.uniform(0.1, 6.0)) for _ in range(3)]
    late = [Blow(rng.randint(1, 3), rng.uniform(0, 0.12)) for _ in range(9)]
    kinds = [signal.SIGKILL] * 5 + [signal.SIGTERM]
    blows = [x._replace(kind=rng.choice(kinds)) if x.saves else x for x in early + late]
    rng.shuffle(blows)
    ends = check(tmp_path, blows, "deep")
    assert ends[-1] == "None" and len(ends) > 5


@pytest.mark.slow
@pytest.mark.parametrize("options", [("nnx",), ("deep", "replay"), ("nnx", "replay")])
def test_killed_models_and_loaders(options, tmp_path):
    """BatchNorm and random streams in the model; a loader that has to start over."""
    blows = [Blow(n, d) for n, d in [(1, 0.01), (2, 0.03), (3, 0.0), (2, 0.05)]]
    ends = check(tmp_path, blows, *options)
    assert ends[-1] == "None" and len(ends) > 3


@contextlib.contextmanager
def group(directory, outputs):
    """Two processes that train together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = [(output, f"{i},2,{port}") for i, output in enumerate(outputs)]
    children = []
    try:
        children += [start(directory, output, place) for output, place in places]
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


@pytest.mark.slow
def test_killed_in_several_processes(tmp_path):
    """Params split between two, of which one gets the signal, or both are killed."""
    directory, expected = tmp_path / "checkpoints", ["0.npz", "1.npz"]
    alone = [tmp_path / f"alone-{name}" for name in expected]
    resumed = [tmp_path / f"resumed-{name}" for name in expected]
    with group(None, alone) as children:
        for child in children:
            out, errors = child.communicate(timeout=PATIENCE)
            assert out.split()[-2:] == ["None", "40"], errors
    blows = [Blow(1, 0.0), Blow(2, 0.05), Blow(2, 0.0, signal.SIGTERM), Blow(1, 0.02)]
    for blow in [*blows, None]:
        before = folders(directory)
        with group(directory, resumed) as children:
            if blow is not None:
                strike(children[1], directory, blow, before)
            if blow is not None and blow.kind == signal.SIGKILL:
                continue
            found = [child.communicate(timeout=PATIENCE) for child in children]
        why = "None" if blow is None else "SIGTERM"
        ends = [out.split()[-2:] for out, _ in found]
        last = str(max(find_steps(directory)))
        # On a busy machine the signal may come after the last step.
        assert ends[0] == ends[1] and ends[0] in ([why, last], ["None", "40"]), found
    for one, other in zip(alone, resumed, strict=True):
        same_bits(one, other)


# In one process.


def make_trainer(directory=None, width=8, optimizer=None, **settings):
    rng = np.random.default_rng(0)
    shapes = {"a": (4, width), "b": (width, width), "c": (width, 2)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    # Dynamic, so that there is but one program to be compiled.
    defaults = {"max_updates": 4, "recalc_every": 4, "mode": "dynamic"}
    settings = defaults | {"total_budget": 0.5} | settings
    return PriorityPropTrainer(
        (params, apply),
        optax.adam(0.01) if optimizer is None else optimizer,
        optax.softmax_cross_entropy_with_integer_labels,
        checkpoint_dir=directory,
        **settings,
    )


def make_loader():
    x = np.random.default_rng(1).normal(size=(96, 4)).astype(np.float32)
    return ArrayLoader((x, (x[:, 0] > 0).astype(np.int32)), batch_size=8)


def bits(trainer):
    tree = trainer.params, trainer.state, trainer.opt_state
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def stop_at_first(trainer, event):
    return event.kind == "step_group"


def on_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return {"mesh": mesh, "sharding": "fsdp"}


SETTINGS = {
    "chain": lambda: {"transformation": "chain"},
    "cost": lambda: {"costs": "flops", "total_budget": 0.7, "mode": "static"},
    "full": lambda: {"total_budget": None},
    "mesh": on_mesh,
    "units": lambda: {"units": "element", "resting": "decay"},
}


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in SETTINGS if x != "chain"]


@pytest.mark.parametrize("name", ["chain", *SLOW])
def test_resumed_in_the_middle_of_an_epoch(name, tmp_path, quick_compilation):
    """By another trainer, with nothing but the directory in common."""
    settings = SETTINGS[name]()
    straight = make_trainer(**settings)
    straight.train(make_loader(), epochs=3, metrics="accuracy")
    stopped = make_trainer(tmp_path, save_every_steps=7, **settings)
    stopped.train(make_loader(), 3, metrics="accuracy", callbacks=stop_at_first)
    assert stopped.history.stopped == "callback" and 0 < stopped.step < 36
    assert stopped.step % 12  # in an epoch
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(make_loader(), epochs=3, metrics="accuracy", resume=True)
    assert resumed.step == straight.step == 36
    assert bits(resumed) == bits(straight)
    where = lambda t: [x.sharding for x in jax.tree.leaves((t.params, t.opt_state))]
    assert where(resumed) == where(straight)
    timed = ("seconds", "compile_seconds")
    told = lambda t: {k: x for k, x in t.history.items() if k not in timed}
    assert told(resumed) == told(straight)
    assert resumed.history.cycles == straight.history.cycles
    savings = lambda t: t.get_priority_report().to_dict()
    assert savings(resumed) == savings(straight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trainer that has come to its end, and its directory, to be copied."""
    directory = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(directory, save_every_steps=6)
    trainer.train(make_loader(), epochs=1)
    return trainer, directory


def test_a_directory_is_of_one_run(saved, tmp_path):
    trainer, directory = saved
    assert find_steps(directory) == [6, 12]
    directory = shutil.copytree(directory, tmp_path / "copy")
    with pytest.raises(
        FileExistsError, match="up to step 12, .* at step 0.*resume=True"
    ):
        make_trainer(directory).train(make_loader(), epochs=1)
    done = make_trainer(directory)
    done.train(make_loader(), epochs=1, resume=True)  # nothing left to do
    assert bits(done) == bits(trainer) and done.epoch == 1
    done.train(make_loader(), epochs=1)  # goes on
    assert done.step == 24 and max(find_steps(directory)) == 24


def test_report_without_a_trainer(saved):
    trainer, directory = saved
    history, report = load_report(directory)
    assert report == trainer.get_priority_report()
    assert history == trainer.history and history.paths == ["a", "b", "c"]


def test_checkpoint_of_another_model(saved):
    _, directory = saved
    for settings, match in [
        ({"width": 9}, r"params\['a'\] was float32\[4,8\], here it is float32\[4,9\]"),
        ({"optimizer": optax.sgd(0.01)}, r"it has opt_state.*\[0\]\.count"),
    ]:
        with pytest.raises(ValueError, match=f"of another model: {match}"):
            make_trainer(directory, **settings).train(make_loader(), 2, resume=True)


def test_nothing_to_resume(tmp_path, saved):
    trainer = make_trainer(tmp_path / "new")
    trainer.train(make_loader(), epochs=1, resume=True)
    assert bits(trainer) == bits(saved[0])


def test_full_disk_does_not_disturb_training(saved, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    save, calls = ocp.AsyncCheckpointer.save, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", fail)
    trainer = make_trainer(tmp_path, save_every_steps=4)
    with pytest.warns(UserWarning, match="No space left on device") as found:
        trainer.train(make_loader(), epochs=1)
    steps = [int(str(w.message).split("step ")[1].split()[0]) for w in found]
    assert steps == [8, 12, 12]  # at the end it is tried again
    assert bits(trainer) == bits(saved[0])
    assert find_steps(tmp_path) == [4]


def test_asked_to_stop(tmp_path, saved):
    """Between two steps; what was there before the call is there after it."""
    before, loader = signal.getsignal(signal.SIGTERM), make_loader()

    class Asking:
        def set_epoch(self, epoch):
            loader.set_epoch(epoch)

        def __iter__(self):
            for i, batch in enumerate(loader):
                if i == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                yield batch

    trainer = make_trainer(tmp_path)
    history = trainer.train(Asking(), epochs=1)
    assert history.stopped == "SIGTERM" and 0 < trainer.step < 12
    assert find_steps(tmp_path) == [trainer.step]
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make_trainer(tmp_path)
    resumed.train(make_loader(), epochs=1, resume=True)
    assert resumed.history.stopped is None
    assert bits(resumed) == bits(saved[0])

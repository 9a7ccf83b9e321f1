"""Checkpoints come back bit for bit, or not at all; a bad disk stops no training."""

import contextlib
import errno
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from priorityprop_jax import make_train_step, prioritize, priority_report
from priorityprop_jax.training import _checkpoint, Checkpoints, History, load_report
from priorityprop_jax.training._checkpoint_files import find_steps, load_meta
from priorityprop_jax.training._checkpoint_leaves import pack
from priorityprop_jax.training._sigterm import stop_on_sigterm
from workers import checkpoint_processes


class Pair(NamedTuple):
    left: Any
    right: Any


def everything():
    """A tree with all that a training state may have in it."""
    rng = np.random.default_rng(0)
    normal = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    return {
        "params": {"Dense_0": {"kernel": normal, "a/b": normal[0] * jnp.nan}},
        "state": {
            "keys": (jax.random.key(3), jax.random.split(jax.random.key(4), 2)),
            "rbg": jax.random.key(5, impl="rbg"),
            "raw": jax.random.PRNGKey(6),
            "nothing": None,
            "empty": {},
            "numpy": rng.normal(size=4),
            "number": np.float64(0.1),
            "python": {1: 7, 2: -0.0, 3: True},
        },
        "opt_state": Pair(
            [normal.astype(t) for t in ("bfloat16", "float16", "float8_e4m3fn")],
            Pair(
                jnp.arange(-3, 3, dtype=jnp.int4),
                (jnp.zeros((0, 3)), jnp.array([True, False]), jnp.uint32(2**32 - 1)),
            ),
        ),
        "weak": jnp.asarray(0.1),
    }


def bits(tree):
    """Structure, and for each leaf all by which it could differ."""
    leaves, treedef = jax.tree.flatten(tree)

    def of(x):
        data = x
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x)
        kind = jax.Array if isinstance(x, jax.Array) else type(x)
        kind = np.ndarray if kind in (np.ndarray, np.float64) else kind
        weak = getattr(x, "weak_type", None)
        dtype = str(x.dtype) if hasattr(x, "dtype") else None
        return kind, dtype, weak, np.shape(x), np.asarray(data).tobytes()

    return treedef, [of(x) for x in leaves]


def small(value, n=4):
    return {"params": {"w": jnp.full(n, value, jnp.float32)}}


def value_of(found):
    tree, _ = found
    return float(tree["params"]["w"][0])


def save_some(directory, steps=(1, 2, 3), **settings):
    with Checkpoints(directory, **settings) as saved:
        for step in steps:
            assert saved.save(step, small(step), {"step": step})


def restore(directory, like=None):
    with Checkpoints(directory) as saved:
        return saved.restore(small(0) if like is None else like)


# What comes back.


def test_everything_comes_back_bit_for_bit(tmp_path):
    tree, meta = everything(), {"a": [1, 0.1, float("inf"), None], "b": {"ä": True}}
    expected = bits(tree)
    save = Checkpoints(tmp_path)
    save.save(5, tree, meta)
    save.close()
    like = jax.tree.map(lambda x: x, everything())
    restored, found = restore(tmp_path, like)
    assert bits(restored) == expected
    assert found == meta
    shapes = jax.eval_shape(lambda: (tree["opt_state"], tree["state"]["keys"]))
    like["opt_state"], like["state"]["keys"] = shapes
    assert bits(restore(tmp_path, like)[0]) == expected


def test_empty_directory_has_nothing(tmp_path):
    with Checkpoints(tmp_path / "a" / "b") as saved:
        assert saved.restore(small(0)) is None
        assert saved.restore_meta() is None
        assert saved.steps() == [] and saved.latest is None


def test_uncommitted_stays_uncommitted(tmp_path):
    """Else a resumed run compiles its programs for other arguments."""
    device = jax.devices()[1]
    tree = {"free": jnp.ones(3), "bound": jax.device_put(jnp.ones(3), device)}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, tree, {})
        restored, _ = saved.restore(tree)
    assert not restored["free"].committed
    assert restored["bound"].committed and restored["bound"].devices() == {device}


def test_comes_back_with_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
    x, keys = np.arange(32.0, dtype=np.float32).reshape(16, 2), jax.random.key(0)
    saved_as = {"w": jax.device_put(x, split), "k": jax.device_put(keys, whole)}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, saved_as, {})
        for sharding in (split, whole, NamedSharding(mesh, P(None, None))):
            like = {"w": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
            restored, _ = saved.restore({**saved_as, **like})
            assert restored["w"].sharding == sharding
            assert restored["k"].sharding == whole
            np.testing.assert_array_equal(restored["w"], x)
            assert (
                jax.random.key_data(restored["k"]) == jax.random.key_data(keys)
            ).all()


def test_optimizer_state_goes_on(tmp_path, quick_compilation):
    loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - x) ** 2)
    tx = prioritize(optax.adam(0.1), budget=0.5)
    step = make_train_step(loss, tx, mode="dynamic")
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 3))}
    state, x = tx.init(params), jnp.eye(3)
    like = jax.tree.map(jnp.copy, (params, state))
    for _ in range(3):
        params, state, _ = step(params, state, x)
    with Checkpoints(tmp_path) as saved:
        saved.save(3, (params, state), step.state_dict())
        for _ in range(9):
            params, state, _ = step(params, state, x)
        end = bits((params, state))
        (params, state), meta = saved.restore(like)
    again = make_train_step(loss, tx, mode="dynamic")
    again.load_state_dict(meta, params)
    for _ in range(9):
        params, state, _ = again(params, state, x)
    assert bits((params, state)) == end


def test_arrays_are_copied_before_save_returns(tmp_path):
    """On the CPU a view of an array would be the memory that the next step writes."""
    n, steps = 1 << 18, 6
    step = jax.jit(lambda x: jax.tree.map(lambda x: x + 1, x), donate_argnums=0)
    tree = {"jax": jnp.zeros(n), "numpy": np.zeros(n)}
    packed = pack(tree).arrays
    assert not np.shares_memory(packed["numpy"], tree["numpy"])
    assert not np.shares_memory(packed["jax"], np.asarray(tree["jax"]))
    del packed
    with Checkpoints(tmp_path, keep=steps) as saved:
        for i in range(steps):
            saved.save(i, tree, {})
            for _ in range(5):
                tree["jax"] = step(tree["jax"])
                tree["numpy"] += 1
        saved.wait()
        for i in reversed(range(steps)):
            found, _ = saved.restore(tree)
            np.testing.assert_array_equal(found["jax"], np.full(n, 5.0 * i))
            np.testing.assert_array_equal(found["numpy"], np.full(n, 5.0 * i))
            shutil.rmtree(tmp_path / str(i))


# When it saves.


def test_every_steps_and_the_last_few(tmp_path):
    calls = []
    with Checkpoints(tmp_path, every_steps=3, keep=2) as saved:
        begun = [
            saved.maybe_save(i, small(i), lambda i=i: calls.append(i) or {"i": i})
            for i in range(1, 11)
        ]
        saved.wait()
        assert saved.steps() == [6, 9] and saved.latest == 9
        assert saved.restore_meta() == {"i": 9}
    assert [i for i, b in enumerate(begun, start=1) if b] == calls == [3, 6, 9]


def test_every_minutes(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_checkpoint.time, "monotonic", lambda: now[0])
    begun = []
    with Checkpoints(tmp_path, every_minutes=2, every_steps=10, keep=9) as saved:
        for step in range(1, 15):
            if saved.maybe_save(step, small(step), {}):
                begun.append(step)
            now[0] += 40
    assert begun == [4, 7, 10, 13]  # that of step 10 both ways


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as saved:
        assert saved.save(4, small(1), {})
        assert not saved.save(4, small(2), lambda: pytest.fail("not needed"))
        assert value_of(saved.restore(small(0))) == 1
        assert saved.save(5, small(3), {})
        assert value_of(saved.restore(small(0))) == 3


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    save_some(tmp_path)
    with Checkpoints(tmp_path) as saved:
        saved.check_continues(3)
        with pytest.raises(FileExistsError, match="up to step 3.*step 0.*resume=True"):
            saved.check_continues(0)


# Half-written and damaged ones.


def test_what_a_killed_process_left_is_not_loaded_and_goes_away(tmp_path):
    save_some(tmp_path, keep=5)
    left = tmp_path / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3", left)
    with Checkpoints(tmp_path, keep=5) as saved:
        assert value_of(saved.restore(small(0))) == 3
        assert saved.save(4, small(4), {})
        saved.wait()
        assert value_of(saved.restore(small(0))) == 4
    assert sorted(x.name for x in tmp_path.iterdir()) == list("1234")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def flipped(path):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 3, len(data), max(len(data) // 3, 1)):
        data[i] ^= 0x10
    path.write_bytes(data)


def missing(path):
    path.unlink()


def files_of(folder):
    return sorted(x.relative_to(folder) for x in folder.rglob("*") if x.is_file())


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, missing])
def test_a_damaged_checkpoint_is_never_loaded(damage, tmp_path):
    """Whichever of its files it is: the right values come back, or those before."""
    rng = np.random.default_rng(0)
    old, new = ({"params": {"w": rng.normal(size=50)}} for _ in range(2))
    with Checkpoints(tmp_path / "whole") as saved:
        saved.save(1, old, {"step": 1})
        saved.save(2, new, {"step": 2})
    files, passed_over = files_of(tmp_path / "whole" / "2"), 0
    for i, file in enumerate(files):
        directory = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", directory)
        damage(directory / "2" / file)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            tree, meta = restore(directory, old)
        expected = new if meta["step"] == 2 else old
        np.testing.assert_array_equal(tree["params"]["w"], expected["params"]["w"])
        found = [str(w.message) for w in seen]
        assert len(found) == (meta["step"] == 1)
        if found:
            assert "step 2" in found[0] and "damaged-2" in found[0]
            assert (directory / "damaged-2").exists()
        passed_over += len(found)
    assert passed_over >= 3  # the data, their index, the meta


@pytest.mark.parametrize("part", ["tree", "meta", "all"])
def test_a_partly_copied_checkpoint_is_never_loaded(part, tmp_path):
    save_some(tmp_path)
    if part == "all":
        shutil.rmtree(tmp_path / "3")
        (tmp_path / "3").mkdir()
    else:
        shutil.rmtree(tmp_path / "3" / part)
    with Checkpoints(tmp_path, keep=2) as saved:
        with pytest.warns(UserWarning, match="step 3 .* is damaged"):
            assert saved.restore_meta() == {"step": 2}
        assert value_of(saved.restore(small(0))) == 2
        assert saved.save(3, small(33), {})
        saved.wait()
        assert saved.steps() == [2, 3]
        assert value_of(saved.restore(small(0))) == 33


def test_only_damaged_ones_are_an_error(tmp_path):
    """And not a reason to begin from scratch, and to delete them after a while."""
    save_some(tmp_path, steps=(1, 2))
    for step in "12":
        (tmp_path / step / "meta" / "metadata").write_text("{")
    with Checkpoints(tmp_path) as saved:
        with pytest.raises(ValueError, match="no checkpoint in .*: step 2: .*; step 1"):
            saved.restore(small(0))
        assert saved.steps() == [1, 2]
    foreign = tmp_path / "foreign"
    with ocp.CheckpointManager(foreign) as manager:
        args = ocp.args
        manager.save(1, args=args.Composite(meta=args.JsonSave({"a": 1})))
    with pytest.raises(ValueError, match="is no checkpoint of a PriorityPropTrainer"):
        restore(foreign)


def test_of_a_later_version(tmp_path):
    """Whole, and so no reason to go on from an older one."""
    save_some(tmp_path, steps=(1, 2))
    file = tmp_path / "2" / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="format 99, and this version of .* reads 1"):
        restore(tmp_path)
    assert (tmp_path / "2").exists()


# A bad disk.


@contextlib.contextmanager
def small_files(limit):
    """No file may grow larger: writes fail, in all threads, C++ included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def noise(seed, n=200_000):
    return {"params": {"w": np.random.default_rng(seed).normal(size=n)}}


def test_full_disk_while_writing(tmp_path, capfd):
    """In the threads of tensorstore, by the operating system."""
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(1, noise(1), {"step": 1})
        saved.wait()
        with small_files(20_000):
            assert saved.save(2, noise(2), {"step": 2})
            with pytest.warns(UserWarning, match="step 2 .*the last is of step 1") as w:
                saved.wait()
            assert len(w) == 1 and "\n" not in str(w[0].message)
            with pytest.warns(UserWarning, match="step 3 .*training goes on") as w:
                saved.save(3, noise(3), {"step": 3})
                saved.wait()
            assert len(w) == 1
        # Nothing that would fill the disk further, and the last good one is there.
        assert [x.name for x in tmp_path.iterdir()] == ["1"]
        tree, meta = saved.restore(noise(0))
        assert meta == {"step": 1}
        np.testing.assert_array_equal(tree["params"]["w"], noise(1)["params"]["w"])
        assert saved.save(4, noise(4), {"step": 4})
        saved.wait()
        assert saved.steps() == [4]  # the old one was not forgotten
    assert capfd.readouterr() == ("", "")


def test_failure_is_told_of_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_POLL", 0.0)
    with Checkpoints(tmp_path, every_steps=100) as saved:
        with small_files(20_000), pytest.warns(UserWarning, match="step 100 .*failed"):
            saved.maybe_save(100, noise(2), {})
            step = 100
            while saved._pending is not None:
                step += 1
                saved.maybe_save(step, noise(3), {})
        assert saved.steps() == []


@pytest.mark.parametrize("place", ["foreground", "background"])
def test_no_space_left(place, tmp_path, monkeypatch):
    """As the error that orbax itself comes upon, before and after it returns."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        raise full

    save_some(tmp_path, steps=(1, 2))
    target = {
        "foreground": (ocp.AsyncCheckpointer, "save"),
        "background": (ocp.PyTreeCheckpointHandler, "finalize"),
    }[place]
    with Checkpoints(tmp_path) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(*target, fail)
            match = "step 3 .*the last is of step 2.*No space left on device"
            with pytest.warns(UserWarning, match=match) as found:
                assert saved.save(3, small(3), {}) == (place == "background")
                saved.wait()
            assert len(found) == 1
        assert sorted(x.name for x in tmp_path.iterdir()) == ["1", "2"]
        assert saved.save(3, small(3), {})
        assert value_of(saved.restore(small(0))) == 3


def test_directory_that_went_away(tmp_path):
    directory = tmp_path / "runs"
    with Checkpoints(directory) as saved:
        saved.save(1, small(1), {})
        saved.wait()
        shutil.rmtree(directory)
        directory.write_text("a file")
        with pytest.warns(UserWarning, match="step 2 .*there is none yet"):
            saved.save(2, small(2), {})
            saved.wait()
        directory.unlink()
        assert saved.save(3, small(3), {})
        assert value_of(saved.restore(small(0))) == 3


@pytest.mark.slow
def test_a_small_disk(tmp_path):
    """A real full disk, where this may be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        directory = disk / "checkpoints"
        with Checkpoints(directory, keep=1) as saved:
            saved.save(1, noise(1, 100_000), {})
            saved.wait()
            with pytest.warns(UserWarning, match="step 2 .*the last is of step 1"):
                saved.save(2, noise(2, 300_000), {})
                saved.wait()
            assert [x.name for x in directory.iterdir()] == ["1"]
            tree, _ = saved.restore(noise(0, 100_000))
            expected = noise(1, 100_000)["params"]["w"]
            np.testing.assert_array_equal(tree["params"]["w"], expected)
            saved.save(3, noise(3, 50_000), {})
            saved.wait()
            assert saved.steps() == [3]
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", str(disk)], check=True)


# Another model.


def test_another_model(tmp_path):
    tree = {"opt_state": [jnp.ones(3)], "params": {"a": jnp.ones((2, 3)), "b": 1.0}}
    with Checkpoints(tmp_path) as saved:
        saved.save(7, tree, {})

    def like(**params):
        return {**tree, "opt_state": [jnp.ones(9)], "params": params}

    a, b = jnp.ones((2, 3)), 1.0
    cases = [
        (like(a=a), r"it has params\['b'\], which is not in this one"),
        (like(a=a, b=b, c=b), r"it lacks params\['c'\], which is in this one"),
        (like(a=a.T, b=b), r"params\['a'\] was float32\[2,3\], here it is .*\[3,2\]"),
        (like(a=a.astype("bfloat16"), b=b), r"params\['a'\] was .* bfloat16\[2,3\]"),
        (like(a=a, b=1), r"params\['b'\] was float64\[\], here it is int64\[\]"),
        (like(a=a, b=b), r"opt_state\[0\] was float32\[3\], here it is float32\[9\]"),
        (a, r"it has params\['a'\], which"),
    ]
    for wrong, match in cases:
        with pytest.raises(ValueError, match=f"step 7 in .* of another model: {match}"):
            restore(tmp_path, wrong)
    assert restore(tmp_path, tree) is not None


def test_another_kind_of_key(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(ValueError, match=r"key was key<fry>\[2\], .*key<rbg>\[4\]"):
            saved.restore({"key": jax.random.key(0, impl="rbg")})


# Reading without a trainer.


def test_load_report(tmp_path):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = prioritize(optax.sgd(0.1), budget=4).init(params)
    report = priority_report(state, params)
    history = History(["w", "b"], "a run")
    history.append({"epoch": 0, "loss": 0.5})
    meta = {"history": history.to_dict(), "report": report.to_dict()}
    with Checkpoints(tmp_path) as saved:
        saved.save(3, params, {"history": History().to_dict(), "report": None})
        saved.save(5, params, meta)
        saved.wait()
        for path in (tmp_path, str(tmp_path), tmp_path / "5"):
            found, table = load_report(path)
            assert found == history and found.name == "a run"
            assert table == report and str(table) == str(report)
        assert load_report(tmp_path / "3") == ({}, None)
        truncated(tmp_path / "5" / "meta" / "metadata")
        with pytest.raises(ValueError, match="5 cannot be read"):
            load_report(tmp_path / "5")
        assert load_report(tmp_path) == ({}, None)
        assert (tmp_path / "5").exists()  # only reads


def test_nothing_to_load(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            load_meta(path)
    save_some(tmp_path, steps=(1,))
    with pytest.raises(ValueError, match="have no history"):
        load_report(tmp_path)


# Bad input.


def test_bad_arguments(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        Checkpoints(file)
    for settings, match in [
        ({"keep": 0}, "keep must be in"),
        ({"every_steps": 0}, "every_steps must be in"),
        ({"every_steps": 1.5}, "every_steps must be an integer"),
        ({"every_minutes": 0}, "every_minutes must be positive"),
        ({"every_minutes": float("nan")}, "every_minutes must be finite"),
        ({"every_minutes": "1"}, "every_minutes must be a number"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            Checkpoints(tmp_path, **settings)
    with Checkpoints(tmp_path) as saved:
        with pytest.raises(TypeError, match=r"state\['f'\] cannot be saved.*str"):
            saved.save(1, {"state": {"f": "text"}}, {})
        with pytest.raises(TypeError, match="meta must be something for JSON"):
            saved.save(1, small(1), {"a": np.ones(3)})
        with pytest.raises(ValueError, match="step must be in"):
            saved.save(-1, small(1), {})
        assert saved.steps() == []


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'priorityprop_jax\[trainer\]'"):
        Checkpoints(tmp_path)


# SIGTERM.


def test_sigterm_asks_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.is_set() and not stop.is_set(3)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set() and stop.is_set(4)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_old_handler_comes_back_after_an_error():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyError), stop_on_sigterm():
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_is_left_alone_in_other_threads():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with stop_on_sigterm() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.is_set()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, False)]


# Several processes.


@pytest.mark.slow
def test_several_processes_save_and_stop_together(tmp_path):
    """Each has a clock of its own, and only one of them gets the signal."""
    worker = pathlib.Path(__file__).parent / "workers" / "checkpoint_processes.py"
    hidden = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"JAX_PLATFORMS": "cpu", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    directory, children = tmp_path / "checkpoints", []
    try:
        for i in range(2):
            command = [sys.executable, worker, *map(str, (i, 2, port, directory))]
            pipe = subprocess.PIPE
            child = subprocess.Popen(command, stdout=pipe, text=True, env=env)
            children.append(child)
        end = time.monotonic() + 200
        while max(find_steps(directory), default=0) < 50:
            assert time.monotonic() < end and children[0].poll() is None
            time.sleep(0.01)
        children[1].send_signal(signal.SIGTERM)
        found = [
            json.loads(x.communicate(timeout=200)[0].splitlines()[-1]) for x in children
        ]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert found[0] == found[1]
    end = found[0]["end"]
    assert found[0]["same"] and len(found[0]["steps"]) >= 2
    assert (found[0]["meta"], found[0]["host"]) == ({"step": end}, end)
    # On a machine that has all of it.
    expected = checkpoint_processes.values(end)
    key = jax.random.key(end)
    like = {**expected, "split": jnp.zeros((4, 2)), "key": key}
    tree, _ = restore(directory, like | {"keys": jax.random.split(key)})
    assert (jax.random.key_data(tree["key"]) == jax.random.key_data(key)).all()
    for name, x in expected.items():
        np.testing.assert_array_equal(tree[name], x)

"""Two processes under DistributedDataParallel: one schedule, and one run."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest


torch = pytest.importorskip("torch", reason="PyTorch is not installed")
bridge = pytest.importorskip("priorityprop_jax.torch")
distributed = pytest.importorskip("torch.distributed")
if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)
nn = torch.nn

SETTINGS = dict(budget=20, min_updates=0, max_updates=9, recalc_every=5)
STEPS, BATCH, PROCESSES, TIMEOUT = 12, 4, 2, 300


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def run(model, part=slice(None)):
    """Trains on a part of each batch. What each step did, and where it led."""
    xs = torch.randn(STEPS, BATCH, 5, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    budget = bridge.PriorityBudget(model, optimizer, **SETTINGS)
    active, quotas, nones = [], [], []
    for x in xs[:, part]:
        active.append(list(budget.active().values()))
        with budget.step():
            model(x).square().mean().backward()
            nones.append([p.grad is None for p in model.parameters()])
            optimizer.step()
        quotas.append(budget.state.quotas)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    return {
        "active": np.array(active),
        "nones": np.array(nones),
        "quotas": np.stack(quotas),
        "scores": budget.state.scores,
        "parameters": vector.numpy(),
    }


def start_group(rank, file, size):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size
    )


def worker(rank, folder):
    start_group(rank, folder / "store", PROCESSES)
    model = nn.parallel.DistributedDataParallel(net(), find_unused_parameters=True)
    np.savez(folder / f"{rank}.npz", **run(model, slice(rank, None, PROCESSES)))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    children = []
    try:
        for rank in range(PROCESSES):
            log = open(folder / f"{rank}.log", "w")
            with log:
                command = [sys.executable, __file__, str(rank), str(folder)]
                children.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                    )
                )
        codes = [child.wait(timeout=TIMEOUT) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(PROCESSES)]
    assert codes == [0] * PROCESSES, "\n".join(log[-3000:] for log in logs)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(PROCESSES)]


def test_processes_agree(results):
    one, other = results
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    active, nones = one["active"], one["nones"]
    due = active.any(1)
    np.testing.assert_array_equal(nones[due], ~active[due])
    assert (nones[~due].sum(1) == 5).all()  # one of six is kept for backward()
    assert 0 < due.sum() < STEPS and not active[due].all()
    assert len(np.unique(one["quotas"], axis=0)) > 1


def test_they_do_what_one_process_does(results):
    alone = run(net())
    np.testing.assert_array_equal(alone["quotas"], results[0]["quotas"])
    np.testing.assert_array_equal(alone["active"], results[0]["active"])
    np.testing.assert_allclose(
        alone["parameters"], results[0]["parameters"], rtol=1e-4, atol=1e-6
    )


def test_ddp_must_be_ready_for_parameters_that_rest(tmp_path):
    start_group(0, tmp_path / "store", 1)
    try:
        ddp = nn.parallel.DistributedDataParallel
        model = ddp(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        make = lambda model, **kwargs: bridge.PriorityBudget(
            model, optimizer, budget=0.5, **kwargs
        )
        with pytest.raises(ValueError, match="must have find_unused_parameters=True"):
            make(model)
        budget = make(model, skip=False)
        for _ in range(3):
            with budget.step():
                model(torch.ones(2, 5)).sum().backward()
                optimizer.step()
        assert budget.state.step == 3
        with pytest.raises(ValueError, match="static_graph=True"):
            make(ddp(model.module, static_graph=True))
        good = make(ddp(model.module, find_unused_parameters=True))
        assert good.names[0] == "0.weight"  # without "module."
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), pathlib.Path(sys.argv[2]))

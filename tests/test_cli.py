"""The command line: what goes where, exit codes, and that what is compared compares."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import priorityprop_jax.cli
from priorityprop_jax import backward_costs, prioritize, PriorityReport
from priorityprop_jax.cli import _arguments, _data, _models, _train, main
from priorityprop_jax.report import LeafReport
from priorityprop_jax.training import ArrayLoader, Event, History
from test_cli_data import write_mnist


# One hidden layer of 8, two batches: compiles fast.
SMALL = ["--model", "mlp", "--width", "8", "--layers", "1"]
TRAIN = ["train", *SMALL, "--examples", "64", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def no_data_directory(monkeypatch):
    monkeypatch.delenv(_data.VARIABLE, raising=False)


def run(argv, capsys):
    """Exit code, stdout and stderr."""
    try:
        code = main(argv)
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def read_json(argv, capsys, code=0):
    found, out, err = run([*argv, "--json"], capsys)
    assert found == code, err
    reject = lambda constant: pytest.fail(f"{constant} is not JSON")
    return json.loads(out, parse_constant=reject)


# --- arguments, help, exit codes


@pytest.mark.parametrize("command", [[], ["train"], ["report"], ["explain"]])
def test_help(command, capsys):
    code, out, err = run([*command, "--help"], capsys)
    assert (code, err) == (0, "")
    assert "exit codes: 0 all went well, 1 the run failed, 2" in out
    if command:
        assert f"examples:\n  priorityprop {command[0]}" in out


@pytest.mark.parametrize("command", ["train", "report", "explain"])
def test_examples_in_the_help_can_be_parsed(command, capsys):
    _, out, _ = run([command, "--help"], capsys)
    text = out.partition("examples:\n")[2].partition("\nexit codes")[0]
    lines = text.replace("\\\n", " ").splitlines()
    calls = [x.partition("|")[0].split()[1:] for x in lines if "priorityprop " in x]
    assert len(calls) >= 2
    for call in calls:
        assert _arguments.parser().parse_args(call).command == command


def test_help_needs_nothing():
    code = (
        "import sys, priorityprop_jax.cli as cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: print(sorted(sys.modules))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    modules = {name.partition(".")[0] for name in eval(out.splitlines()[-1])}
    assert not {"flax", "sklearn", "orbax", "matplotlib", "tqdm"} & modules


def test_version(capsys):
    code, out, _ = run(["--version"], capsys)
    assert (code, out) == (0, f"priorityprop_jax {priorityprop_jax.__version__}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["report"], "required: CHECKPOINT"),
        (["train", "--data", "imagenet"], "invalid choice: 'imagenet'"),
        (["train", "--wings", "2"], "unrecognized arguments: --wings 2"),
        (["train", "--budget", "0"], "must be a share in (0, 1]"),
        (["train", "--budget", "1.5"], "got '1.5'"),
        (["train", "--budget", "nan"], "got 'nan'"),
        (["train", "--budget", "half"], "got 'half'"),
        (["train", "--epochs", "0"], "must be an integer from 1 on, got '0'"),
        (["train", "--epochs", "2.0"], "from 1 on, got '2.0'"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--learning-rate", "-0.1"], "--learning-rate"),
        (["train", "--learning-rate", "inf"], "must be a positive number, got 'inf'"),
        (["train", "--compare", "full,radnom"], "did you mean 'random'?"),
        (["train", "--compare", ""], "must be one of full, priority"),
        (["train", "--data", "mnist"], "--data mnist needs --data-dir, or $PRIORITY"),
        (["train", "--data", "cifar10"], "--data cifar10 needs --data-dir"),
        (["train", "--data-dir", "here"], "digits is what scikit-learn ships with"),
        (["train", "--data", "text", "--model", "cnn"], "cnn is for images"),
        (["train", "--resume"], "--resume needs --checkpoint-dir"),
        (
            ["train", "--budget-of", "flops", "--budget", "40"],
            "--budget-of flops needs",
        ),
        (["train", "--min-updates", "5", "--max-updates", "4"], "5 is more than"),
        (["explain", "--budget", "40"], "must be a share in (0, 1], got '40'"),
        (["explain", "--data", "text", "--model", "mlp"], "mlp is for images"),
    ],
)
def test_usage(argv, message, capsys):
    code, out, err = run(argv, capsys)
    assert (code, out) == (2, "")
    assert message in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and last.endswith(" --help)")
    assert len(err.splitlines()) <= 2  # the one before it says what the data are


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--data", "mnist", "--data-dir", "gone"], "gone is not a directory"),
        (["train", "--data", "mnist", "--data-dir", "."], ". lacks files: looked for"),
        (["train", "--data", "cifar10", "--data-dir", "."], ". lacks files"),
        (["train", "--data", "text", "--data-dir", "."], "has no *.txt"),
        (["explain", "--data", "text", "--data-dir", "gone"], "neither file nor"),
        (["train", "--html", "gone/page.html"], "there is no directory gone"),
        (["train", "--html", "."], "this is a directory"),
        (["report", "gone"], "gone"),
        (["report", "."], "no checkpoint"),
    ],
)
def test_failure(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(argv, capsys)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_damaged_data(tmp_path, capsys):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run(
        ["train", "--data", "mnist", "--data-dir", str(tmp_path)], capsys
    )
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path}: truncated")


def test_data_directory_in_the_environment(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("abc" * 500)
    monkeypatch.setenv(_data.VARIABLE, str(tmp_path))
    argv = ["explain", "--data", "text", "--context", "8", "--layers", "1"]
    found = read_json([*argv, "--width", "32"], capsys)
    shapes = {leaf["path"]: leaf["shape"] for leaf in found["leaves"]}
    assert shapes["embed/embedding"] == [3, 32]
    monkeypatch.setenv(_data.VARIABLE, str(tmp_path / "gone"))
    assert run(["explain"], capsys)[0] == 0  # the digits need no directory


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("two\n  lines"), 1, "two lines"),
        (
            OSError(28, "No space left on device"),
            1,
            "[Errno 28] No space left on device",
        ),
        (FloatingPointError("the loss"), 1, "FloatingPointError: the loss"),
        (RuntimeError(""), 1, "RuntimeError: RuntimeError"),
    ],
)
def test_errors_are_one_line(error, code, message, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr("priorityprop_jax.cli._explain.run", fail)
    assert run(["explain"], capsys) == (code, "", f"error: {message}\n")
    with pytest.raises(type(error)) if code == 1 else pytest.raises(SystemExit):
        raise SystemExit(main(["explain", "--traceback"]))


def test_without_flax(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "priorityprop_jax.cli._models")
    monkeypatch.delattr(priorityprop_jax.cli, "_models")
    code, out, err = run(["explain"], capsys)
    assert (code, out) == (1, "")
    assert 'pip install "priorityprop_jax[cli]"' in err and err.count("\n") == 1


def test_without_scikit_learn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, _, err = run(["train"], capsys)
    assert code == 1 and 'pip install "priorityprop_jax[examples]"' in err


def test_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(["train", "--html", str(tmp_path / "page.html")], capsys)
    assert code == 1 and 'pip install "priorityprop_jax[plots]"' in err


def test_reader_that_has_enough():
    command = f"{sys.executable} -m priorityprop_jax.cli explain --model mlp | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.returncode == 0
    assert done.stdout == ("digits, mlp: 150,794 params in 8 leaves, batches of 64\n")


# --- explain


MLP = {
    "a": {"w": np.zeros((784, 8), "f4"), "b": np.zeros(8, "f4")},
    "b": {"w": np.zeros((8, 10), "f4"), "b": np.zeros(10, "f4")},
}
MNIST_BATCH = np.zeros((32, 28, 28, 1), "f4"), np.zeros(32, "i4")


def mlp_loss(params, inputs, labels):
    x = inputs.reshape(len(inputs), -1)
    hidden = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"][None])
    logits = hidden @ params["b"]["w"] + params["b"]["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_explain_counts(capsys):
    argv = ["explain", *SMALL, "--data", "mnist", "--batch-size", "32"]
    found = read_json([*argv, "--recalc-every", "5"], capsys)
    by_path = {leaf["path"]: leaf for leaf in found["leaves"]}
    sizes = {"Dense_0/kernel": (784, 8), "Dense_1/kernel": (8, 10)}
    for path, (m, n) in sizes.items():
        assert by_path[path]["shape"] == [m, n]
        assert by_path[path]["weight"] == 2 * 32 * m * n  # the textbook's matmul
    depths = {path: leaf["depth"] for path, leaf in by_path.items()}
    assert depths == {
        "Dense_0/bias": 1,
        "Dense_0/kernel": 1,
        "Dense_1/bias": 0,
        "Dense_1/kernel": 0,
    }
    assert found["params"] == 784 * 8 + 8 + 8 * 10 + 10
    # Another model of the same kind, written out, costs as much up to small change.
    costs = backward_costs(mlp_loss, MLP, *MNIST_BATCH)
    np.testing.assert_allclose(found["full"], costs.full, rtol=0.02)
    cut, whole = found["truncations"]
    active = {"a": {"w": False, "b": False}, "b": {"w": True, "b": True}}
    np.testing.assert_allclose(cut["flops"], costs.flops(active), rtol=0.02)
    assert cut["leaves"] == 2 and cut["params"] == 90
    assert whole["share"] == whole["step_speedup"] == whole["cycle_speedup"] == 1
    steps = [found["full"], *[cut["flops"]] * 4]
    np.testing.assert_allclose(cut["cycle_speedup"], 5 * found["full"] / sum(steps))


def test_least_budget_is_the_librarys(capsys):
    """Where `explain` says that a budget cannot be kept, `prioritize` warns."""
    small = ["explain", *SMALL, "--data", "mnist", "--batch-size", "32"]
    found = read_json(small, capsys)
    costs = backward_costs(mlp_loss, MLP, *MNIST_BATCH)
    least = (costs.full + 9 * costs.forward) / (10 * costs.full)
    np.testing.assert_allclose(found["least_budget"], least, rtol=0.02)
    tx = lambda budget: prioritize(optax.sgd(0.1), budget, costs=costs)
    tx(least + 0.001).init(MLP)
    with pytest.warns(UserWarning, match="The least feasible"):
        tx(least - 0.001).init(MLP)
    for budget, answer in [(least + 0.02, True), (least - 0.02, False)]:
        argv = [*small, "--budget", f"{budget:.4f}"]
        assert read_json(argv, capsys)["feasible"] is answer
        assert f"{'can' if answer else 'cannot'} be kept" in run(argv, capsys)[1]


@pytest.mark.parametrize(
    ("data", "model"),
    [
        ("digits", "cnn"),
        ("digits", "transformer"),
        ("mnist", "mlp"),
        ("mnist", "transformer"),
        ("cifar10", "resnet"),
        ("text", "transformer"),
    ],
)
def test_explain_models(data, model, capsys):
    found = read_json(["explain", "--data", data, "--model", model], capsys)
    shares = [cut["share"] for cut in found["truncations"]]
    assert shares == sorted(shares) and shares[-1] == 1
    assert found["forward"] / found["full"] < shares[0]
    depths = [leaf["depth"] for leaf in found["leaves"]]
    assert depths == sorted(depths, reverse=True)
    assert (
        sum(np.prod(leaf["shape"], dtype=int) for leaf in found["leaves"])
        == (found["params"])
    )


def test_explain_table(capsys):
    code, out, err = run(["explain", "--model", "cnn"], capsys)
    assert (code, err) == (0, "")
    assert "Conv_0/kernel" in out and "depth 0 to 4" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("width", [16, 48, 64, 70, 100])
def test_any_width(width):
    model = _models.build("transformer", 10, width=width, layers=1)
    x = np.zeros((2, 8, 8, 1), np.float32)
    variables = jax.eval_shape(lambda: _models.init(model, x, seed=0))
    assert jax.eval_shape(model.apply, variables, x).shape == (2, 10)


def test_transformer_of_text_sees_no_future(quick_compilation):
    model = _models.build("transformer", 10, width=8, layers=1)
    x = np.arange(6, dtype=np.int32)[None]
    apply, variables = jax.jit(model.apply), _models.init(model, x, seed=0)
    logits = np.asarray(apply(variables, x))
    changed = np.asarray(apply(variables, np.where(np.arange(6) < 4, x, 9)))
    np.testing.assert_allclose(logits[:, :4], changed[:, :4], atol=1e-6)
    assert not np.allclose(logits[:, 4:], changed[:, 4:], atol=1e-3)


def test_patches_are_pieces_of_the_image():
    image = np.arange(64.0).reshape(1, 8, 8, 1)
    patches = np.asarray(_models._patches(image))
    assert patches.shape == (1, 16, 4)
    np.testing.assert_array_equal(patches[0, 5], image[0, 2:4, 2:4, 0].ravel())


# --- train


class FakeTrainer:
    """Trains nothing; remembers what it was given."""

    made: list = []

    def __init__(self, model, optimizer, loss_fn, *schedule, **settings):
        self.schedule, self.settings, self.seen = schedule, settings, []
        self.made.append(self)

    def train(self, loader, epochs, *, callbacks, name, **arguments):
        history = History(name=name)
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            self.seen.append(list(loader))
            known = {"loss": 2.0, "eval_accuracy": 0.5, "eval_loss": float("nan")}
            totals = {"flops_spent": 30.0, "flops_full": 40.0, "seconds": 1.0}
            history.append({"epoch": epoch, **known, **totals})
            callbacks(self, Event("epoch", epoch, len(self.seen), known))
        return history

    def get_priority_report(self):
        leaf = LeafReport("w", (2,), 1, 0, 0.5, 5, 5, 1.0, 0)
        return PriorityReport((leaf,), 10, 10, 5, 0)


@pytest.fixture
def fake(monkeypatch):
    init = lambda model, inputs, seed: {"w": np.full(2, seed, np.float32)}
    monkeypatch.setattr(_models, "init", init)
    monkeypatch.setattr(_train, "PriorityPropTrainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "made", [])
    return FakeTrainer.made


def test_runs_differ_in_the_schedule_only(fake, capsys):
    argv = [*TRAIN, "--compare", "full, random,priority,cyclic", "--budget", "0.25"]
    found = read_json([*argv, "--epochs", "2"], capsys)
    names = ["priority", "full", "random", "cyclic"]
    assert [one["name"] for one in found["runs"]] == names
    assert [t.schedule[0] for t in fake] == [0.25, None, 0.25, 0.25]
    assert [t.settings["score"] for t in fake] == ["priority", *names[:1], *names[2:]]
    first = fake[0]
    for other in fake[1:]:
        jax.tree.map(
            np.testing.assert_array_equal,
            (first.settings["params"], first.seen),
            (other.settings["params"], other.seen),
        )
        assert other.settings["seed"] == first.settings["seed"]
    one, two = first.seen
    assert len(one) == 2 and not np.array_equal(one[0][1], two[0][1])  # shuffled


@pytest.mark.parametrize(
    ("argv", "budget", "costs", "mode"),
    [
        ([], 0.5, None, "dynamic"),
        (["--budget", "7", "--mode", "static"], 7, None, "static"),
        (["--budget", "1.0", "--budget-of", "flops"], 1.0, "flops", "dynamic"),
        (["--budget-of", "ms", "--mode", "auto"], 0.5, "ms", "auto"),
        (["--score", "full", "--budget-of", "ms"], None, None, "auto"),
    ],
)
def test_settings(argv, budget, costs, mode, fake, capsys):
    read_json([*TRAIN, *argv], capsys)
    (trainer,) = fake
    assert trainer.schedule == (budget, 1, 20, 10)
    assert trainer.settings["costs"] == costs and trainer.settings["mode"] == mode


@pytest.mark.parametrize("name", _arguments.OPTIMIZERS)
def test_optimizers(name):
    tx = _train._optimizer(name, None)
    params = {"w": np.ones(3, np.float32)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.all(np.asarray(updates["w"]) < 0)


def test_what_is_not_finite_is_null(fake, capsys):
    code, out, _ = run([*TRAIN, "--json"], capsys)
    assert code == 0 and "NaN" not in out
    assert json.loads(out)["runs"][0]["eval_loss"] is None
    assert "nan" in run(TRAIN, capsys)[1]


def test_progress_and_table(fake, capsys):
    argv = [*TRAIN, "--epochs", "2", "--compare", "ucb"]
    code, out, err = run(argv, capsys)
    assert code == 0
    assert err.splitlines() == [
        "digits from scikit-learn: 1,438 images, 359 more for testing; 64 are used",
        "priority: epoch 1/2, loss 2.0000, test accuracy 50.00%",
        "priority: epoch 2/2, loss 2.0000, test accuracy 50.00%",
        "ucb: epoch 1/2, loss 2.0000, test accuracy 50.00%",
        "ucb: epoch 2/2, loss 2.0000, test accuracy 50.00%",
    ]
    lines = out.splitlines()
    assert lines[0] == "digits, mlp, adam"
    assert lines[3].split() == ["priority", "50.00%", "nan", "5", "50.0%"] + [
        "30",
        "75.0%",
        "1.0",
        "-",
    ]
    assert "one of the 359 test images is 0.28% of accuracy" in out
    assert "priority gave its updates to:\nleaf  shape" in out
    assert run([*argv, "--quiet"], capsys)[1:] == (out, "")


def test_results_come_before_the_page(fake, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left")

    monkeypatch.setattr(PriorityReport, "html", fail)
    code, out, err = run([*TRAIN, "--html", str(tmp_path / "a.html")], capsys)
    assert code == 1 and out.startswith("digits, mlp, adam")
    assert err.splitlines()[-1] == "error: [Errno 28] No space left"


def test_directories_and_policies(fake, tmp_path, capsys):
    saved = ["--checkpoint-dir", str(tmp_path), "--on-nonfinite", "skip"]
    read_json([*TRAIN, *saved, "--compare", "full"], capsys)
    read_json([*TRAIN, *saved], capsys)
    found = [os.fspath(t.settings["checkpoint_dir"]) for t in fake]
    assert found == [str(tmp_path / "priority"), str(tmp_path / "full"), str(tmp_path)]
    assert {t.settings["on_nonfinite"] for t in fake} == {"skip"}


def test_full_run_is_plain_training(tmp_path, quick_compilation, capsys):
    """Compared with a loop written by hand; and page, report and JSON in one go."""
    page, saved = tmp_path / "page.html", tmp_path / "saved"
    argv = [*TRAIN, "--epochs", "2", "--compare", "full", "--html", str(page)]
    found = read_json([*argv, "--checkpoint-dir", str(saved)], capsys)
    budgeted, full = found["runs"]
    assert full["step"] == 4 and full["updates"] == 4 * 4 and full["updates_share"] == 1
    assert full["flops_share"] == 1 and full["flops_spent"] == full["flops_full"]
    assert budgeted["flops_full"] == full["flops_full"]
    assert budgeted["updates"] <= 0.5 * 10 * 4
    np.testing.assert_allclose(  # what explain foretells is what is accounted for
        full["flops_spent"], 4 * read_explained(capsys), rtol=1e-6
    )

    data = _data.load("digits", None, examples=64)
    model = _models.build("mlp", 10, 8, 1)
    params, tx = _models.init(model, data.train[0], 0), optax.adam(1e-3)
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state, x, y):
        def loss_fn(params):
            logits = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    loader = ArrayLoader(data.train, 32, seed=0)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            params, state, loss = step(params, state, x, y)
            losses.append(float(loss))
    expected = np.reshape(losses, (2, 2)).mean(1)
    np.testing.assert_allclose(full["history"]["loss"], expected, rtol=1e-5)
    logits = model.apply(params, data.test[0])
    accuracy = float((logits.argmax(-1) == data.test[1]).mean())
    np.testing.assert_allclose(full["eval_accuracy"], accuracy, atol=1e-6)

    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "Dense_1/kernel" in text
    for one in (budgeted, full):
        (report,) = read_json(["report", str(saved / one["name"])], capsys)["runs"]
        assert report == one
    assert read_json(["report", str(saved)], capsys)["runs"] == [full, budgeted]
    code, out, _ = run(["report", str(saved)], capsys)
    assert code == 0 and out.startswith("run       test accuracy")
    assert "full:\nepoch  step" in out
    code, out, _ = run(["report", str(saved / "full"), "--html", str(page)], capsys)
    assert code == 0 and "eval accuracy" in out and "16 updates of 4 units" in out
    assert page.read_text() != text


def read_explained(capsys):
    argv = ["explain", *SMALL, "--batch-size", "32"]
    return read_json(argv, capsys)["full"]


def test_stopped_and_resumed(tmp_path, monkeypatch, quick_compilation, capsys):
    """After SIGTERM in the middle, the resumed run ends as one without a stop."""
    argv = [*TRAIN, "--epochs", "3", "--quiet"]
    (whole,) = read_json(argv, capsys)["runs"]
    argv += ["--checkpoint-dir", str(tmp_path)]
    remark = _train.Output.remark

    def terminate(self, line):
        remark(self, line)
        if line.startswith("priority: epoch 2/3"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(_train.Output, "remark", terminate)
        (stopped,) = read_json(argv, capsys, code=143)["runs"]
    assert stopped["stopped"] == "SIGTERM" and 0 < stopped["step"] < 6
    code, out, err = run(argv, capsys)
    assert (code, out) == (1, "") and "resume" in err  # nothing is overwritten
    (resumed,) = read_json([*argv, "--resume"], capsys)["runs"]
    for name in ("loss", "eval_loss", "updates", "flops_spent"):
        assert whole["history"][name] == resumed["history"][name]
    assert whole["report"] == resumed["report"]


def test_loss_that_is_not_finite(quick_compilation, capsys):
    argv = [*TRAIN, "--epochs", "2", "--optimizer", "sgd", "--learning-rate", "1e38"]
    code, out, err = run([*argv, "--score", "full", "--quiet"], capsys)
    assert (code, out) == (1, "")
    assert err.startswith("error: FloatingPointError: the loss was not finite")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_text(tmp_path, quick_compilation, capsys):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 40)
    argv = ["train", "--data", "text", "--data-dir", str(tmp_path), "--context", "8"]
    argv += ["--width", "8", "--layers", "1", "--epochs", "1", "--score", "full"]
    code, out, err = run(argv, capsys)
    assert code == 0, err
    assert out.startswith("text, transformer, adam")
    assert "accuracy is that of the next character" in out
    assert "text: a.txt from" in err


@pytest.mark.slow
def test_resnet_of_cifar(tmp_path, quick_compilation, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(60) % 10
    np.savez(tmp_path / _data.CIFAR_NPZ, images=images, labels=labels)
    argv = ["train", "--data", "cifar10", "--data-dir", str(tmp_path), "--width", "4"]
    argv += ["--epochs", "1", "--batch-size", "16", "--mode", "dynamic"]
    (one,) = read_json(argv, capsys)["runs"]
    assert one["step"] == 3 and one["updates"] > 0

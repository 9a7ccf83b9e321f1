"""`PriorityPropTrainer`: model, optimizer and loss function in, a trained model out."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._checks import check_count, check_name
from .._costs import BackwardCosts
from .._priority import find_state
from .._units import layout
from ..report import priority_report, PriorityReport
from ._batches import Batch
from ._checkpoint import Checkpoints
from ._evaluation import evaluate, predict
from ._history import History
from ._loop import Event, Loop
from ._metrics import Account, Means
from ._models import as_functional
from ._objective import Objective, resolve_metrics, Structure, takes_model
from ._placement import Placement
from ._saving import restore
from ._schedules import by_leaf_on_device, holds_schedule, ScheduleArguments
from ._step import make_train_step, MODES, TrainStep


POLICIES = ("raise", "skip")
# Of metrics with such names less is better.
_FALLING = ("loss", "error", "perplexity", "mse", "mae", "rmse", "nll")


class PriorityPropTrainer:
    """Trains a model under a budget of updates.

    A loop around `make_train_step`: batches are put on the device ahead of time, what
    the steps report is read behind them, so that none waits for the host.

    Args:
      model: a `flax.nnx.Module`, which gets the trained values at the end of `train`; a
        `flax.linen.Module`, with `example_input` or `params`; or a pair ``(params,
        apply_fn)`` with ``apply_fn(params, inputs)``. BatchNorm, dropout and whether
        the model is in training are taken care of: by ``.train()`` and ``.eval()``, or
        by an argument called ``train``, ``training``, ``is_training`` or
        ``deterministic``.
      optimizer: any optax transformation. If it holds a `priority_prop` or a
        `prioritize` it is used as it is, and the arguments from `total_budget` to
        `costs` are not.
      loss_fn: ``loss_fn(logits, labels)``, a scalar or one number per example; or
        ``loss_fn(model, batch, rng)``, a scalar or ``(scalar, metrics)``, which calls
        ``model(inputs)``. Losses per example are averaged over the examples of a batch,
        and their batches are padded to one size, unless the model has a BatchNorm; with
        a scalar, each new size of a batch is another program. A loss that compares
        examples must be a scalar, as it would see the padding.
      total_budget: as `budget` of `prioritize`: updates in a cycle, or a share. None:
        all leaves at every step, the optimizer alone; each step is a cycle then.
      min_updates: see `prioritize`.
      max_updates: see `prioritize`.
      recalc_every: see `prioritize`.
      params: of a linen module: what its ``init`` returned; of a function.
      example_input: an array for the ``init`` of a linen module.
      transformation: ``"prioritize"``, or ``"chain"`` for
        ``optax.chain(priority_prop(...), optimizer)``.
      units: see `prioritize`.
      magnitude: see `prioritize`.
      score: see `prioritize`.
      depth_factor: see `prioritize`.
      depths: ``"auto"``: read off the computation; None: off the names of modules; or a
        pytree of ints.
      resting: see `prioritize`.
      costs: None; or ``"flops"``, ``"ms"`` or what `backward_costs` returned, for a
        budget of cost: `total_budget` is then a share of the cost of full training.
      mode: of `make_train_step`.
      compute_dtype: to which params and inputs are cast for the forward and backward
        pass, such as ``jnp.bfloat16``. Params, optimizer and loss stay in their type.
        With ``loss_fn(model, batch, rng)`` the batch comes as it is.
      on_nonfinite: where the loss of a step is not finite, that step changes nothing
        (see `make_train_step`). Then ``"raise"``: a FloatingPointError, some steps
        later; ``"skip"``: it is counted.
      seed: of keys and of ``score="random"``. Step i has the key
        ``jax.random.fold_in(jax.random.key(seed), i)``.
      checkpoint_dir: where to save, with orbax; None: nowhere.
      save_every_steps: how often to save, and at the end of training.
      save_every_minutes: the same by time; None: only by steps.
      keep: how many checkpoints are kept.
      mesh: of the devices; batches are split along its first axis.
      sharding: of the params over the mesh: None or ``"replicated"``, ``"fsdp"``, a
        pytree of shardings, or a function ``(path, leaf) -> PartitionSpec``.
      progress: whether to show a bar, where stderr is a terminal.

    Attributes:
      params: the present ones; a step reuses their memory, so copy what you keep.
      state: what else of the model changes.
      opt_state: of the optimizer; None before the first batch.
      step: steps done. epoch: epochs done.
      paths: of the leaves, as ``"Dense_0/kernel"``.
      costs: `BackwardCosts` in FLOPs, for the shapes of the first batch.
      train_step: the `TrainStep`.
      history: the `History` of all calls of `train`.

    Raises:
      ValueError, TypeError: an argument cannot be meant, the model has nothing to
        train.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from priorityprop_jax import PriorityPropTrainer
      >>> model = {"w": jnp.zeros((2, 2))}, lambda params, x: x @ params["w"]
      >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
      >>> y = (x[:, 0] > 0).astype(np.int32)
      >>> batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
      >>> loss = optax.softmax_cross_entropy_with_integer_labels
      >>> trainer = PriorityPropTrainer(model, optax.adam(0.1), loss, total_budget=0.5)
      >>> history = trainer.train(batches, epochs=10, metrics="accuracy")
      >>> history["accuracy"][-1] > 0.9, history["updates"][-1]
      (True, [20])
      >>> trainer.evaluate(batches)["accuracy"] > 0.9, trainer.predict(x).shape
      (True, (64, 2))
      >>> trainer.fit(batches, 0.9, metric="accuracy", max_epochs=5).stopped
      'target'
      >>> report = trainer.get_priority_report()
      >>> report.leaves[0].path, report.step
      ('w', 44)
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        loss_fn: Callable[..., Any],
        total_budget: Any = 100,
        min_updates: Any = 1,
        max_updates: Any = 20,
        recalc_every: int = 10,
        *,
        params: Any = None,
        example_input: Any = None,
        transformation: str = "prioritize",
        units: Any = "leaf",
        magnitude: str = "l2",
        score: Any = "priority",
        depth_factor: Any = 1.0,
        depths: Any = "auto",
        resting: str = "keep",
        costs: str | BackwardCosts | None = None,
        mode: str = "auto",
        compute_dtype: Any = None,
        on_nonfinite: str = "raise",
        seed: int = 0,
        checkpoint_dir: Any = None,
        save_every_steps: int | None = None,
        save_every_minutes: float | None = 10.0,
        keep: int = 3,
        mesh: jax.sharding.Mesh | None = None,
        sharding: Any = None,
        progress: bool = True,
    ):
        check_name("mode", mode, MODES)
        check_name("on_nonfinite", on_nonfinite, POLICIES)
        check_count("seed", seed, least=0, static=True)
        if compute_dtype is not None and not jnp.issubdtype(
            compute_dtype, jnp.floating
        ):
            raise ValueError(
                f"compute_dtype must be a floating type such as jax.numpy.bfloat16, or "
                f"None, got {compute_dtype!r}"
            )
        with_model = takes_model(loss_fn)
        self.model = as_functional(model, params, example_input, seed)
        self._arguments = ScheduleArguments(
            optimizer,
            total_budget,
            min_updates,
            max_updates,
            recalc_every,
            transformation,
            units,
            magnitude,
            score,
            depth_factor,
            depths,
            resting,
            costs,
            seed,
        )
        self._given = holds_schedule(optimizer, self.model.params)
        if not self._given:
            self._arguments.check()
        self._mode, self.on_nonfinite, self.progress = mode, on_nonfinite, progress
        self.seed, self._directory = seed, checkpoint_dir
        self._saves = save_every_steps, save_every_minutes, keep
        self.placement = Placement(mesh, sharding)
        self._objective = Objective(
            self.model,
            loss_fn,
            with_model,
            {},
            compute_dtype,
            seed,
            self.placement.hold,
        )
        self.params = self.placement.tree(self.model.params)
        self.state = self.placement.replicate(self.model.state)
        self.opt_state: Any = None
        self.step, self.epoch = 0, 0
        self.paths = layout(self.params, "leaf").names
        self.costs: BackwardCosts | None = None
        self.train_step: TrainStep | None = None
        self.history = History(self.paths)
        self.totals = {"seconds": 0.0, "compile_seconds": 0.0, "skipped": 0}
        self.account: Account | None = None
        self.means, self.recalc_every, self.units_in_all = Means(), recalc_every, 0
        self.names: list[str] = []
        self.depths: Any = None
        self.schedule_costs: BackwardCosts | None = None
        self.place: dict[str, Any] = {}
        self._saved_step: dict[str, Any] | None = None
        self._structure = Structure(self._objective)
        self._programs: dict[Any, Any] = {}
        self._padded: dict[Any, bool] = {}

    def __repr__(self) -> str:
        return (
            f"PriorityPropTrainer(model={self.model.kind}, leaves={len(self.paths)}, "
            f"step={self.step}, epoch={self.epoch})"
        )

    # What is for users.

    def train(
        self,
        dataloader: Any,
        epochs: int = 1,
        *,
        eval_data: Any = None,
        metrics: Any = None,
        callbacks: Any = (),
        resume: bool = False,
        name: str | None = None,
    ) -> History:
        """Trains, from where the last call ended.

        Args:
          dataloader: any iterable of batches of NumPy, JAX, torch or TensorFlow arrays.
            What comes from a list or a tuple is read where it lies: nobody should write
            to it meanwhile. Other iterables may use their memory again.
            A batch is ``(inputs, labels)``, a mapping with one of ``"inputs"``,
            ``"x"``, ``"image"`` and one of ``"labels"``, ``"y"``, ``"label"``, or for
            ``loss_fn(model, batch, rng)`` any pytree of arrays.
          epochs: how many times to go through it; with `resume`, how many in all.
          eval_data: another one, to be evaluated after each epoch.
          metrics: ``"accuracy"``, a function ``(outputs, labels)`` that returns a
            scalar or a number per example, a sequence of these or a mapping from names.
            A ``loss_fn(model, batch, rng)`` returns its own instead. None: those of
            the last call, at first none.
          callbacks: a function ``(trainer, event)``, or several; see `Event`. Training
            stops if one returns True.
          resume: whether to go on from the newest checkpoint in `checkpoint_dir`, if
            there is one: at the same step, with the same data and keys.
          name: of the run, in the history.

        Returns:
          The `History`, of this and all earlier calls.

        Raises:
          ValueError, TypeError: the loader or a batch cannot be meant.
          FloatingPointError: a loss was not finite, with ``on_nonfinite="raise"``.
        """
        check_count("epochs", epochs, least=0)
        callbacks = _as_callbacks(callbacks)
        if resume and self._directory is None:
            raise ValueError("resume=True needs checkpoint_dir=, where to resume from")
        self._use(metrics)
        self._structure = Structure(self._objective)
        with self._checkpoints() as saved:
            resumed = resume and restore(self, saved)
            if not resumed:
                self.place, self.means = {"start_epoch": self.epoch}, Means()
            if saved is not None and not resume:
                saved.check_continues(self.step)
            if name is not None:
                self.history.name = name
            stop_epoch = epochs if resume else self.epoch + epochs
            loop = Loop(self, dataloader, stop_epoch, eval_data, callbacks, saved)
            try:
                if self.epoch < stop_epoch:
                    loop.run(replay=resumed)
            finally:
                self._write_back()
        return self.history

    def fit(
        self,
        dataloader: Any,
        target: float,
        *,
        metric: str = "eval_accuracy",
        max_epochs: int = 100,
        eval_data: Any = None,
        metrics: Any = None,
        callbacks: Any = (),
        resume: bool = False,
        name: str | None = None,
    ) -> History:
        """Trains until a metric has reached a target, but not for ever.

        Args:
          dataloader: as in `train`, like all that is not named here.
          target: to be reached: from above by losses and errors, by the name of the
            metric, else from below.
          metric: a column of the history.
          max_epochs: after so many, it is over in any case.
          eval_data: see `train`; needed for a metric that begins with ``"eval_"``.
          metrics: see `train`; None: the one of `metric`.
          callbacks: see `train`.
          resume: see `train`.
          name: see `train`.

        Returns:
          The `History`, with ``stopped == "target"`` if it was reached.

        Raises:
          ValueError: there is no such metric; and as in `train`.
        """
        base = metric.removeprefix("eval_")
        if metric != base and eval_data is None:
            raise ValueError(f"metric={metric!r} needs eval_data=")
        if metrics is None:
            own = base == "loss" or self._objective.with_model
            metrics = None if own else base
        falls = base.lower().endswith(_FALLING)

        def reached(trainer, event):
            if event.kind != "epoch":
                return None
            if metric not in event.metrics:
                raise ValueError(
                    f"metric={metric!r} is none of {', '.join(event.metrics)}"
                )
            value = event.metrics[metric]
            return "target" if (value <= target if falls else value >= target) else None

        return self.train(
            dataloader,
            max_epochs,
            eval_data=eval_data,
            metrics=metrics,
            callbacks=[*_as_callbacks(callbacks), reached],
            resume=resume,
            name=name,
        )

    def evaluate(self, dataloader: Any, metrics: Any = None) -> dict[str, float]:
        """Means of loss and metrics over a loader, of the model not in training.

        Args:
          dataloader: as in `train`.
          metrics: as in `train`; None: those of the last call of `train`.

        Returns:
          ``{"loss": ..., metric: ...}``.

        Raises:
          ValueError, TypeError: the loader or a batch cannot be meant.
        """
        objective = self._objective
        if metrics is not None:
            objective = objective._replace(metrics=self._resolve(metrics))
        return self._evaluate(dataloader, objective, "dataloader")

    def predict(self, inputs: Any, batch_size: int = 256) -> Any:
        """The outputs of the model, not in training.

        Args:
          inputs: an array, or a mapping of arrays, of all examples; or a loader of
            batches: of inputs, or with labels, which are passed over.
          batch_size: for arrays: how many examples at once.

        Returns:
          The outputs for all examples in order, NumPy arrays.

        Raises:
          ValueError, TypeError: the loader or a batch cannot be meant.
        """
        return predict(
            self._program("predict", self._objective.predict),
            (self.params, self.state),
            inputs,
            batch_size,
            self.placement,
        )

    def get_priority_report(self) -> PriorityReport:
        """Who got which share of the budget, and what that saved.

        The savings are sums over the steps: of the leaves that were due and, in static
        mode, of those whose gradients were computed with them; in FLOPs, by the shapes
        of the first batch.

        Returns:
          A `PriorityReport`.

        Raises:
          ValueError: nothing has been trained yet.
        """
        if self.opt_state is None or self.account is None:
            raise ValueError("nothing has been trained yet: call train first")
        if self.train_step is not None:
            self.account.follow(self.train_step.computed)
        report = priority_report(self.opt_state, self.params, costs=self.costs)
        return self.account.correct(report)

    # What the loop needs.

    def check_batch(self, batch: Any) -> Any:
        """Raises where a batch has another structure than can be meant."""
        return self._structure(batch)

    def padded(self, batch: Any) -> bool:
        """Whether batches like this one can be padded."""
        if self.model.couples_examples:
            return False
        kinds = [(np.shape(x), np.result_type(x)) for x in jax.tree.leaves(batch)]
        key = jax.tree.structure(batch), *kinds, *self._objective.metrics.items()
        if key not in self._padded:  # takes a trace
            arguments = self.params, self.state, batch, True
            self._padded[key] = self._objective.is_by_example(*arguments)
        return self._padded[key]

    def build(self, batch: Batch) -> None:
        """Makes, from the first batch, what is not there yet."""
        if self.train_step is not None:
            return
        example = self.params, self.state, batch.data, batch.weights, np.int32(0)
        self.names = self._objective.names(*example[:3], True)
        if self.opt_state is None:
            found = self._arguments.look(self._objective.train, example, self._given)
            self.build_schedule(*found)
        units = None if self._given else self._arguments.units
        self.train_step = make_train_step(
            self._objective.train,
            self._tx,
            self._mode,
            has_aux=True,
            units=units,
            skip_nonfinite=True,
        )
        if self._saved_step is not None:
            self.train_step.load_state_dict(self._saved_step, self.params)
        assert self.account is not None
        self.account.skip(self.train_step.computed)

    def build_schedule(self, depths: Any, costs: Any, schedule_costs: Any) -> None:
        """Makes the optimizer and its state."""
        self.depths, self.costs, self.schedule_costs = depths, costs, schedule_costs
        tx = self._arguments.optimizer
        if not self._given:
            tx = self._arguments.build(depths, schedule_costs)
        self._tx = self.placement.constrain(tx)
        self.opt_state = self.placement.init(self._tx, self.params)
        schedule = find_state(self.opt_state, self.params)
        if self._given:
            self.recalc_every = int(np.size(schedule.rank))
        self.units_in_all = int(np.sum(jax.device_get(schedule.sizes)))
        self.account = Account(costs)
        self._snapshot = by_leaf_on_device(self.opt_state, self.params)

    def resume_step(self, saved: dict[str, Any]) -> None:
        """The next training step is to go on as the one that this is from."""
        self._saved_step, self.train_step = saved, None

    def snapshot(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """By leaf: counts, quotas and scores, on the device."""
        return self._snapshot(self.opt_state)

    def evaluate_now(self, eval_data: Any) -> dict[str, float]:
        """`evaluate` with the metrics of training."""
        return self._evaluate(eval_data, self._objective, "eval_data")

    def _write_back(self) -> None:
        if not any(x.is_deleted() for x in jax.tree.leaves(self.params)):
            self.model.write_back(self.params, self.state)

    def _checkpoints(self) -> Any:
        if self._directory is None:
            return contextlib.nullcontext()
        return Checkpoints(self._directory, *self._saves)

    # What both of these need.

    def _resolve(self, metrics: Any) -> dict[str, Callable[..., Any]]:
        found = resolve_metrics(metrics)
        if found and self._objective.with_model:
            raise ValueError(
                "metrics are for loss_fn(logits, labels); a loss_fn(model, batch, rng) "
                "returns its own: (loss, {name: value})"
            )
        return found

    def _use(self, metrics: Any) -> None:
        """Other metrics need another step."""
        found = self._objective.metrics if metrics is None else self._resolve(metrics)
        if found != self._objective.metrics:
            self._objective = self._objective._replace(metrics=found)
            if self.train_step is not None:
                self.resume_step(self.train_step.state_dict())

    def _program(self, name: str, function: Callable[..., Any], *key: Any) -> Any:
        if (name, *key) not in self._programs:
            self._programs[name, *key] = jax.jit(function)
        return self._programs[name, *key]

    def _evaluate(
        self, loader: Any, objective: Objective, name: str
    ) -> dict[str, float]:
        program = self._program(
            "evaluate", objective.evaluate, *objective.metrics.items()
        )
        model = self.params, self.state
        return evaluate(objective, program, model, loader, self.placement, name)


def _as_callbacks(callbacks: Any) -> list[Callable[[Any, Event], Any]]:
    found = [callbacks] if callable(callbacks) else list(callbacks)
    for callback in found:
        if not callable(callback):
            raise TypeError(
                f"callbacks must be functions (trainer, event), got {callback!r}"
            )
    return found

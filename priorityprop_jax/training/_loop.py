"""One call of `PriorityPropTrainer.train`: steps, epochs, and what is told of them."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ._batches import Batch, feed, length
from ._metrics import Background, CompileClock, Means
from ._objective import STEPS
from ._progress import Progress
from ._saving import meta_of, tree_of
from ._sigterm import stop_on_sigterm


GROUP = 20  # steps told of at once


class Event(NamedTuple):
    """What a callback is told.

    Examples:
      >>> from priorityprop_jax.training import Event
      >>> def stop_early(trainer, event):
      ...     return event.kind == "epoch" and event.metrics["loss"] < 0.1
      >>> stop_early(None, Event("epoch", epoch=3, step=120, metrics={"loss": 0.05}))
      True
    """

    kind: str  # "epoch": at its end; "step_group": some 20 steps have become known
    epoch: int  # from 0
    step: int  # steps done, up to which the metrics go
    metrics: dict[str, Any]  # of an epoch, the entry of the history; else means


class Loop:
    """Runs a trainer over a loader. All that outlives the call is in the trainer."""

    def __init__(
        self,
        trainer: Any,
        dataloader: Any,
        stop_epoch: int,
        eval_data: Any,
        callbacks: Sequence[Callable[..., Any]],
        saved: Any,
    ):
        self.trainer, self.dataloader, self.stop_epoch = trainer, dataloader, stop_epoch
        self.eval_data, self.callbacks, self._saved = eval_data, callbacks, saved
        self._queue, self._group, self._stop = Background(), Means(), ""
        self._waits = trainer.placement.shares_threads
        self._done: Batch | None = None  # the last batch that is done with
        # For the bar, as last known: loss, share of updates, of FLOPs saved.
        self._shown: tuple[float | None, ...] = (None, None, None)

    def run(self, replay: bool) -> None:
        """Trains until `stop_epoch`, or until somebody stops it.

        Args:
          replay: whether the loader is new and has to be brought to where the trainer
            is; else it has been gone through up to there.
        """
        t = self.trainer
        with contextlib.ExitStack() as stack:
            self._clock = stack.enter_context(CompileClock())
            before = t.totals["seconds"], t.totals["compile_seconds"]
            self._started = time.perf_counter(), *before
            signal = stack.enter_context(stop_on_sigterm())
            batches = stack.enter_context(contextlib.closing(self._feed(replay)))
            self._bar = stack.enter_context(contextlib.closing(self._progress()))
            for batch in batches:
                self._step(batch)
                if batch.last:
                    self._end_epoch()
                self._done = batch
                if self._saved is not None:
                    self._saved.maybe_save(t.step, tree_of(t), self._meta)
                if signal.is_set(t.step):
                    self._stop = "SIGTERM"
                if self._stop:
                    break
            self._settle()
            t.history.stopped = self._stop or None
            if self._saved is not None:
                self._saved.save(t.step, tree_of(t), self._meta)
                self._saved.wait()  # as long as another SIGTERM does no harm

    def _meta(self) -> dict[str, Any]:
        self._settle()
        done = self._done
        if done is not None:
            self.trainer.place = {
                "start_epoch": done.epoch + done.last,
                "start_batch": 0 if done.last else done.index + 1,
                "size": done.size,
                "state": done.state,
            }
        return meta_of(self.trainer)

    def _feed(self, replay: bool) -> Any:
        t = self.trainer
        return feed(
            self.dataloader,
            t.placement,
            padded=t.padded,
            prepare=t.check_batch,
            stop_epoch=self.stop_epoch,
            states=self._saved is not None,
            # A thread takes longer than it saves where nothing has to be moved.
            depth=0 if t.placement.on_host else 2,
            replay=replay,
            **t.place,
        )

    def _progress(self) -> Progress:
        t, count = self.trainer, length(self.dataloader)
        total = count and t.step + count * (self.stop_epoch - t.epoch)
        on = t.progress
        return Progress(on, total=total, epochs=self.stop_epoch, initial=t.step)

    def _step(self, batch: Any) -> None:
        t = self.trainer
        if self._done is None:
            t.build(batch)
        t.params, t.opt_state, metrics = t.train_step(
            t.params, t.opt_state, t.state, batch.data, batch.weights, np.int32(t.step)
        )
        if self._waits:
            t.placement.wait(metrics.loss)
        t.state, sums = metrics.aux
        t.step += 1
        # On the host in static mode, where the step itself keeps an account.
        due = metrics.due if isinstance(metrics.due, jax.Array) else None
        self._queue.push((batch.epoch, t.step), (sums, due))
        cycle, left = divmod(t.step, t.recalc_every)
        if not left and t.history.wants_cycle(cycle - 1):
            self._queue.push(cycle - 1, t.snapshot())
        if self._queue.is_due:
            self._read(self._queue.pop())
        if self._bar.is_on:
            self._bar.update(batch.epoch + 1, t.step, *self._shown)

    def _read(self, arrived: Any) -> None:
        t = self.trainer
        for tag, values in arrived:
            if isinstance(tag, int):
                if t.history.wants_cycle(tag):
                    rows = (x.tolist() for x in values)
                    t.history.append_cycle((tag + 1) * t.recalc_every, *rows)
                continue
            (epoch, step), (sums, due) = tag, values
            if due is not None:
                t.account.add(due)
            for means in (t.means, self._group):
                means.add(t.names, sums)
            if not sums[t.names.index(STEPS)]:
                self._nonfinite(epoch, step)
            if self._group.entries >= GROUP:
                self._tell_group(epoch, step)

    def _nonfinite(self, epoch: int, step: int) -> None:
        t = self.trainer
        t.totals["skipped"] += 1
        if t.on_nonfinite == "raise":
            raise FloatingPointError(
                f"the loss was not finite in epoch {epoch + 1}, at step {step} of the "
                f"run. That step has changed nothing. With on_nonfinite='skip' "
                f"training goes on, and such steps are counted"
            )

    def _tell_group(self, epoch: int, step: int) -> None:
        found = self._group.means()
        self._shown, self._group = self._look(found["loss"]), Means()
        self._tell(Event("step_group", epoch, step, found))

    def _tell(self, event: Event) -> None:
        for callback in self.callbacks:
            answer = callback(self.trainer, event)
            if answer is True or isinstance(answer, str):
                self._stop = self._stop or ("callback" if answer is True else answer)

    def _look(self, loss: float) -> tuple[float | None, ...]:
        t, cycles = self.trainer, self.trainer.history.cycles
        t.account.follow(t.train_step.computed)
        if not cycles["step"] or not t.account.full:
            return loss, None, None
        made = sum(cycles["counts"][-1]) / (t.units_in_all * cycles["step"][-1])
        return loss, made, 1 - t.account.spent / t.account.full

    def _settle(self) -> None:
        """Waits for all that is on its way, and brings the totals up to date."""
        t = self.trainer
        self._read(self._queue.pop(everything=True))
        t.account.follow(t.train_step.computed)
        start, seconds, compiling = self._started
        t.totals["seconds"] = seconds + time.perf_counter() - start
        t.totals["compile_seconds"] = compiling + self._clock.seconds

    def _end_epoch(self) -> None:
        t = self.trainer
        self._settle()
        entry = {"epoch": t.epoch, "step": t.step, **t.means.means()}
        self._shown, t.means = self._look(entry["loss"]), Means()
        if self.eval_data is not None:
            found = t.evaluate_now(self.eval_data)
            entry |= {f"eval_{name}": x for name, x in found.items()}
            self._settle()
        counts = [int(x) for x in jax.device_get(t.snapshot()[0])]
        spent = {"flops_spent": t.account.spent, "flops_full": t.account.full}
        entry |= {**t.totals, **spent, "updates": counts}
        t.history.append(entry)
        t.epoch += 1
        self._bar.finish(t.epoch, t.step, *self._shown)
        self._tell(Event("epoch", t.epoch - 1, t.step, entry))

"""What happens around the steps of one start of a run: looks at held-out data, saves, endings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trimpot.runner import engine as engines
from trimpot.runner.adapters.peft_io import save_adapter
from trimpot.runner.checkpoint import Reader, load_state
from trimpot.runner.copier import Copier, Uncopied, together
from trimpot.runner.data.compile import Compiled
from trimpot.runner.engine import Engine
from trimpot.runner.errors import CheckpointError, CorruptionError, SaveError, TrainError
from trimpot.runner.health import Action, Health
from trimpot.runner.loop import held_out_loss
from trimpot.runner.pace import Pace
from trimpot.runner.pulse import PULSE
from trimpot.runner.replicas import Replicas
from trimpot.runner.sample import answer_prompts
from trimpot.runner.saver import Failed, Saved, Saver
from trimpot.runner.types import Checkpoint, Event, Plan, StepReport

Report = Callable[[StepReport | Event], None]
Reopen = Callable[[Callable[[int], bool]], tuple[Checkpoint, Reader] | None]
"""The newest good checkpoint whose step is accepted, the same on all workers; all must call."""


def read_text(path: Path) -> str:
    """What a flag of the driver's says; "" where it is not up."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


class Session:
    """Every worker has one, and all call the same methods at the same steps."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        data: Compiled,
        held_out: Compiled | None,
        report: Report,
        health: Health,
        last: Checkpoint | None,
        asked: Callable[[], bool],
        reopen: Reopen,
        token: str,
        copier: Copier | None = None,
    ):
        """`last`: the checkpoint that this start goes on from. `token`: as of Saver. `copier`:
        worker 0's, where checkpoints are copied to a store."""
        self.health, self.reopen = health, reopen
        self.replicas = Replicas(engine) if plan.config.health.check_every else None
        self.checked = 0
        """The step after which the weights were checked last."""
        self.plan, self.engine, self.data, self.held_out = plan, engine, data, held_out
        self.report, self.last, self.asked = report, last, asked
        self.run = Path(plan.run_dir)
        self.rank, self.world = engines.ranks()
        section = plan.config.checkpoint
        self.copier, self.uncopied = copier, ""
        folder, reading = self.run / "checkpoints", copier.wanted if copier else tuple
        self.saver = Saver(folder, section.keep, self.rank, self.world, token, reading)
        self.pace: Pace | None = None
        if section.every_steps == "auto" and self.rank == 0:
            self.pace = Pace(section.hours_between_failures)
        self.trouble = ""
        """Why the newest save failed, while none has succeeded since."""

    def signals(self) -> list[float]:
        """What this worker tells the others with each step."""
        flags = (self.run / "stop", self.run / "leave") if self.rank == 0 else ()
        stop = self.asked() or any(flag.exists() for flag in flags)
        due = self.pace is not None and self.pace.due() and self.saver.job is None
        return [float(stop), float(due), *self.saver.progress()]

    def after(self, step: StepReport, signals: list[float]) -> bool:
        """Evaluate and save where the plan says so, then report the step → whether to stop."""
        stop, due, written, failed = signals
        self._hear(self.saver.advance(written, failed))
        self._hear_copier()
        config = self.plan.config
        final = step.step == self.plan.total_steps
        if self.health.bad is not None:
            step = self._treat(step, final)
        every = config.health.check_every
        if every and step.step % every == 0:
            self._check(step)
        every = config.evaluation.every_steps
        if final or (every and step.step % every == 0):
            step = replace(step, held_out_loss=self.evaluate(step.step))
        every = config.checkpoint.every_steps
        if final or stop:
            self._check(step)
            try:
                saved = self.save(step.step, complete=final)
            except SaveError:
                self.report(step)  # it was done
                raise
            step = replace(step, checkpoint=saved.path.name)
        elif due or (every != "auto" and step.step % every == 0):
            began = time.perf_counter()
            self._hear(self.saver.finish())
            self._check(step)
            self._begin(step.step, complete=False, began=began)
        self.report(step)
        return bool(stop)

    @PULSE.within("save")
    def _check(self, step: StepReport) -> None:
        """Whether weights are what they must be, before anything is made of them. Raises
        CorruptionError on all workers."""
        if self.replicas is None or self.checked == step.step:
            return
        self.checked = step.step
        try:
            self.report(Event("check", self.replicas.check(step.step)))
        except CorruptionError as error:
            self.report(step)  # it was done
            values = {"step": step.step, "ranks": list(error.ranks), "text": str(error)}
            self.report(Event("corruption", values))
            raise

    def _treat(self, step: StepReport, final: bool) -> StepReport:
        """What follows from a bad step. Raises TrainError where the run can't go on."""
        bad, action, to = self.health.bad, self.health.action(final), None
        assert bad is not None
        no_way_back = False
        if action == "rewind":
            self._hear(self.saver.finish())
            to = self._rewind()
            no_way_back = to is None
            action: Action = "stop" if no_way_back else "rewind"
        self.report(Event("bad_step", self.health.event(action, to)))
        if action == "stop":
            self.report(replace(step, health=f"{bad.why}: stopped"))
            raise TrainError(self.health.complaint(no_way_back))
        if to is None:
            return replace(step, health=f"{bad.why}: skipped")
        self.health.rewound(to, step.step)
        return replace(step, health=f"{bad.why}: back to step {to}")

    @PULSE.within("save")
    def _rewind(self) -> int | None:
        """Put back what was before the bad steps → the step it is of; None where nothing is."""
        if (found := self.reopen(self.health.may_return_to)) is None:
            return None
        checkpoint, reader = found
        self.engine.rewind(reader.whole, reader.part, checkpoint.step)
        reader.close()
        return checkpoint.step

    @PULSE.within("evaluate")
    def evaluate(self, step: int) -> float | None:
        if self.held_out is None:
            return None
        loss, tokens, samples = held_out_loss(self.plan, self.engine, self.held_out)
        values = {"step": step, "loss": loss, "tokens": tokens, "samples": samples}
        self.report(Event("eval", values))
        return loss

    @PULSE.within("generate")
    def show(self, when: str) -> None:
        """Answer held-out prompts. All workers do: under ZeRO-3 generating is a collective."""
        section = self.plan.config.samples
        if self.held_out is None or not section.prompts:
            return
        asked = self.held_out.shown[: section.prompts]
        answers = answer_prompts(
            self.plan, self.engine, [prompt for prompt, _, _ in asked], section.max_new_tokens
        )
        for (_, question, reference), answer in zip(asked, answers, strict=True):
            values = {"when": when, "prompt": question, "answer": answer, "reference": reference}
            self.report(Event("sample", values))

    @PULSE.within("save")
    def _begin(self, step: int, complete: bool, began: float | None = None) -> None:
        """Copy what is trained, and have it written. Under ZeRO every worker must call. `began`:
        time.perf_counter() when training stopped for it, if that was not now."""
        began = time.perf_counter() if began is None else began
        config = self.plan.config
        sharded = self.world > 1 and config.method != "lora"
        facts = {
            "plan_digest": self.plan.digest,
            "data_digest": self.data.digest,
            "world_size": self.world,
            "zero_stage": self.plan.zero_stage,
            "method": config.method,
            "health": self.health.state(),
            **({"shapes": self.engine.shapes()} if sharded else {}),
        }
        self.saver.begin(
            self.engine.share() if sharded else self.engine.state(),
            sharded=sharded,
            began=began,
            step=step,
            cursor=step * config.optim.batch_size,
            complete=complete,
            facts=facts,
            spare=None if complete else self.health.copy().may_return_to,
        )
        if self.pace is not None:
            self.pace.begun()

    def _hear(self, outcomes: list[Saved | Failed]) -> None:
        """Tell what became of a save. Of several failures in a row only the first is news."""
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                if not self.trouble:
                    text = f"step {outcome.step} is not saved: {outcome.why}; the run goes on"
                    self.report(Event("warning", {"text": text}))
                self.trouble = outcome.why
                continue
            saved = self.last = outcome.checkpoint
            self.trouble = ""
            values: dict[str, Any] = {"step": saved.step, "path": str(saved.path)}
            values |= {"seconds": outcome.seconds, "stall_seconds": outcome.stall_s}
            if self.pace is not None:
                self.pace.measured(outcome)
                values["next_seconds"] = self.pace.every_s
            self.report(Event("checkpoint", values))
            if self.copier is not None:
                self.copier.offer(saved)

    def _hear_copier(self) -> None:
        """Tell what became of copies. Of several failures in a row only the first is news."""
        for outcome in self.copier.outcomes() if self.copier is not None else ():
            if not isinstance(outcome, Uncopied):
                self.uncopied = ""
                self.report(Event("copy", dataclasses.asdict(outcome)))
                continue
            if not self.uncopied:
                text = f"the checkpoint of step {outcome.step} is not copied: {outcome.why}"
                self.report(Event("warning", {"text": f"{text}; the run goes on"}))
            self.uncopied = outcome.why

    def close(self) -> Checkpoint:
        """After the last step: see that what was trained is where it belongs → the last
        checkpoint. Every worker must call. Raises SaveError on all."""
        assert self.last is not None
        complete, why = self.last.complete, ""
        if complete and self.rank == 0 and not (self.run / "adapter").is_dir():
            why = self._write_adapter()  # an earlier start, elsewhere maybe, did the last step
        if why := engines.first_text(why):
            raise SaveError(self._missing(self.last.step, why))
        section = self.plan.config.checkpoint
        # Workers that make room for more start again on this disk: that copy can wait.
        growing = not complete and read_text(self.run / "leave") == "grow"
        if section.copy_to is None or engines.first_text("growing" if growing else ""):
            return self.last
        last, wait_s = self.last, section.copy_wait_s if complete else 0.0
        why = together(lambda: self.copier.finish(last, wait_s) if self.copier else "")
        self._hear_copier()
        if complete and (why := engines.first_text(why or "")):
            raise SaveError(
                f"the last checkpoint is not in {section.copy_to}: {why}; it is in {last.path}; "
                "mend that, and start again: only the copy is left to make"
            )
        return last

    @PULSE.within("save")
    def save(self, step: int, complete: bool) -> Checkpoint:
        """Save, and wait until that is durable. Raises SaveError on all workers."""
        self._hear(self.saver.finish())
        self._begin(step, complete)
        self._hear(self.saver.finish())
        # What worker 0 says counts: it alone knows of the commit.
        if engines.first_text(self.trouble if self.rank == 0 else ""):  # once more, with more room
            if self.rank == 0 and self.last is not None:
                self.saver.make_room(self.last)
            self._begin(step, complete)
            self._hear(self.saver.finish())
        if not self.trouble and complete and self.rank == 0:
            self.trouble = self._write_adapter()
        if why := engines.first_text(self.trouble if self.rank == 0 else ""):
            raise SaveError(self._missing(step, why))
        if self.rank:  # only worker 0 knows the rest
            path = self.run / "checkpoints" / f"step-{step:08d}"
            cursor = step * self.plan.config.optim.batch_size
            self.last = Checkpoint(path, step, cursor, self.plan.digest, "", complete)
        assert self.last is not None
        return self.last

    def _missing(self, step: int, why: str) -> str:
        kept, there = 0, "there is no checkpoint"
        if self.last is not None:
            kept, there = self.last.step, f"{self.last.path} is the newest checkpoint"
        lost = f"steps {kept + 1} to {step} are lost" if kept < step else "no step is lost"
        return f"{why}; {lost}, {there}; make room, and start again: it goes on from there"

    def _write_adapter(self) -> str:
        """Write RUN/adapter from the checkpoint that was just saved → what went wrong."""
        config = self.plan.config
        if config.method != "lora":
            return ""
        assert self.last is not None
        try:
            state = load_state(self.last, keys=("weight",))
            tensors = {name: values["weight"] for name, values in state.items()}
            save_adapter(tensors, config.adapter, self.plan.model_path, self.run / "adapter")
        except (OSError, SafetensorError, CheckpointError) as error:
            return f"{self.run}/adapter can't be written: {error}"
        return ""

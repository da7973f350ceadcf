"""What happens around the steps of one start of a run: looks at held-out data, saves, endings."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trimpot.runner import engine as engines
from trimpot.runner.adapters.peft_io import save_adapter
from trimpot.runner.checkpoint import load_state, prune
from trimpot.runner.data.compile import Compiled
from trimpot.runner.engine import Engine
from trimpot.runner.errors import CheckpointError, SaveError
from trimpot.runner.loop import held_out_loss
from trimpot.runner.pulse import PULSE
from trimpot.runner.sample import answer_prompts
from trimpot.runner.saver import Failed, Pace, Saved, Saver
from trimpot.runner.types import Checkpoint, Event, Plan, StepReport

Report = Callable[[StepReport | Event], None]


class Session:
    """Every worker has one, and all call the same methods at the same steps."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        data: Compiled,
        held_out: Compiled | None,
        report: Report,
        last: Checkpoint | None,
        asked: Callable[[], bool],
    ):
        """`last`: the checkpoint that this start goes on from."""
        self.plan, self.engine, self.data, self.held_out = plan, engine, data, held_out
        self.report, self.last, self.asked = report, last, asked
        self.run = Path(plan.run_dir)
        self.rank, self.world = engines.ranks()
        section = plan.config.checkpoint
        token = engines.first_text(secrets.token_hex(4) if self.rank == 0 else "")
        self.saver = Saver(self.run / "checkpoints", section.keep, self.rank, self.world, token)
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
        config = self.plan.config
        final = step.step == self.plan.total_steps
        every = config.evaluation.every_steps
        if final or (every and step.step % every == 0):
            step = replace(step, held_out_loss=self.evaluate(step.step))
        every = config.checkpoint.every_steps
        if final or stop:
            try:
                saved = self.save(step.step, complete=final)
            except SaveError:
                self.report(step)  # it was done
                raise
            step = replace(step, checkpoint=saved.path.name)
        elif due or (every != "auto" and step.step % every == 0):
            self._hear(self.saver.finish())
            self._begin(step.step, complete=False)
        self.report(step)
        return bool(stop)

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
    def _begin(self, step: int, complete: bool) -> None:
        """Copy what is trained, and have it written. Under ZeRO every worker must call."""
        began = time.perf_counter()
        config = self.plan.config
        sharded = self.world > 1 and config.method != "lora"
        facts = {
            "plan_digest": self.plan.digest,
            "data_digest": self.data.digest,
            "world_size": self.world,
            "zero_stage": self.plan.zero_stage,
            "method": config.method,
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

    @PULSE.within("save")
    def save(self, step: int, complete: bool) -> Checkpoint:
        """Save, and wait until that is durable. Raises SaveError on all workers."""
        self._hear(self.saver.finish())
        self._begin(step, complete)
        self._hear(self.saver.finish())
        # What worker 0 says counts: it alone knows of the commit.
        if engines.first_text(self.trouble if self.rank == 0 else ""):  # once more, with more room
            if self.rank == 0 and self.last is not None:
                prune(self.run / "checkpoints", self.last, keep=1)
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

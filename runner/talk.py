"""Answers of a run's model, tuned or as its base, to what a person asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimpot.runner import hub
from trimpot.runner.adapters.lora import adapter_off
from trimpot.runner.data.compile import load_splits
from trimpot.runner.data.templates import Message
from trimpot.runner.engine import device
from trimpot.runner.errors import UserError
from trimpot.runner.tuned import Trained, find_trained, load_base, put_trained, trained_names

Emit = Callable[[str], None]


class Talker:
    """A run's model, loaded once. `compare`: be able to answer as the base, too."""

    def __init__(self, run: Path, compare: bool):
        trained = find_trained(run)
        self.plan = trained.plan
        self.lora = trained.method == "lora"
        self.model, self.tokenizer = load_base(run, None)
        parameters = dict(self.model.named_parameters())
        kept = trained_names(self.model, trained) if compare and not self.lora else []
        self.base = {name: parameters[name].detach().clone().to(device()) for name in kept}
        put_trained(self.model, trained)
        self.model.to(device())
        facts = hub.model_facts(self.plan.model_path, self.plan.config.model.revision)
        self.positions = facts.max_positions
        self.render = self.tokenizer.renderer(self.plan.config.data.chat_template)
        if _trained_without_template(trained):
            self.render = None
        self.ends = self._ends()

    def answer(
        self, turns: list[Message], max_new_tokens: int, *, base: bool = False, emit: Emit
    ) -> str:
        """The model's greedy answer to a conversation that ends with a user's turn.

        `emit` hears the text as it comes. The oldest turns are left out where the model's
        positions are too few for all. Raises UserError for a question that is itself too long.
        """
        ids = self._fit(turns)
        stream = Stream(self.tokenizer.decode, emit, skip=len(ids))
        prompt = torch.tensor([ids], device=device())
        model: Any = self.model
        with torch.no_grad(), hub.quiet(), self._as(base):
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(max_new_tokens, self.positions - len(ids)),
                do_sample=False,
                use_cache=True,
                pad_token_id=self.tokenizer.inner.eos_token_id,
                eos_token_id=self.ends,
                streamer=stream,
            )
        text = self.tokenizer.decode(output[0][len(ids) :].tolist())
        stream.finish(text)
        return text

    @contextmanager
    def _as(self, base: bool) -> Iterator[None]:
        """Inside, the model is its base where `base` says so; no second copy of it is loaded."""
        if base and self.lora:
            with adapter_off(self.model):
                yield
            return
        self._swap(base)
        try:
            yield
        finally:
            self._swap(base)

    def _swap(self, base: bool) -> None:
        parameters = dict(self.model.named_parameters()) if base else {}
        for name, parameter in parameters.items():
            if name in self.base:
                parameter.data, self.base[name] = self.base[name], parameter.data

    def _fit(self, turns: list[Message]) -> list[int]:
        """Token ids of the conversation, with room for at least one more."""
        turns = [{**turn, "content": _whole(turn["content"])} for turn in turns]
        while True:
            ids = self._encode(turns)
            if 0 < len(ids) < self.positions:
                return ids
            if len(turns) <= 2 and not ids:
                raise UserError("the question is empty; ask something")
            if len(turns) <= 2:
                raise UserError(
                    f"the question has {len(ids)} tokens and the model takes {self.positions}, "
                    "answer included; shorten it"
                )
            turns = turns[2:]

    def _encode(self, turns: list[Message]) -> list[int]:
        if self.render is None:  # no turns without a template: the text alone
            text, special = turns[-1]["content"], True
        else:
            text, special = self._rendered(turns, True), False
        ids, _ = next(iter(self.tokenizer.encode([text], special=special)))
        return list(ids)

    def _rendered(self, turns: list[Message], ask: bool) -> str:
        system = self.plan.config.data.system_prompt
        if system is not None:
            turns = [{"role": "system", "content": system}, *turns]
        assert self.render is not None
        try:
            return self.render(turns, ask)
        except ValueError as error:
            raise UserError(f"the chat template fails on this conversation: {error}") from None

    def _ends(self) -> list[int]:
        """Tokens that end an answer: of the tokenizer, of the model, and the template's end of
        turn, which is what a run trains."""
        found: Any = self.model.generation_config.eos_token_id  # pyright: ignore
        ends = {self.tokenizer.inner.eos_token_id, *(found if isinstance(found, list) else [found])}
        if self.render is not None:
            chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\0"}]
            after = self._rendered(chat, False).rpartition("\0")[2]
            ids = next(iter(self.tokenizer.encode([after], special=False)))[0]
            added = self.tokenizer.inner.added_tokens_decoder
            ends |= {i for i in ids[:1] if i in added and added[i].special}
        return sorted(end for end in ends if end is not None)


def _trained_without_template(trained: Trained) -> bool:
    """Whether the samples were plain text, so that a template would ask what was never trained."""
    splits = load_splits(trained.run / "data")
    form = splits[0].form if splits else trained.plan.config.data.format
    return form == "text"


def _whole(text: str) -> str:
    """Without lone surrogates, which a command line that is not UTF-8 leaves."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Stream:
    """What `generate` hands each token to: emits text as soon as its characters are whole."""

    def __init__(self, decode: Callable[[list[int]], str], emit: Emit, skip: int):
        self.decode, self.emit, self.skip = decode, emit, skip
        self.ids: list[int] = []
        self.said = ""

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        skipped = min(self.skip, len(ids))  # the prompt comes first
        self.skip -= skipped
        self.ids += ids[skipped:]
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):  # the rest of a character is still to come
            self._say(text)

    def end(self) -> None:
        """Part of what `generate` calls; `finish` has the whole text."""

    def finish(self, text: str) -> None:
        self._say(text)

    def _say(self, text: str) -> None:
        if text.startswith(self.said) and len(text) > len(self.said):
            self.emit(text[len(self.said) :])
            self.said = text

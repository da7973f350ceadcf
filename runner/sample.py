"""Greedy answers to prompts, by the model as it stands in training."""

from __future__ import annotations

from pathlib import Path

import torch

from trimpot.runner import hub
from trimpot.runner.engine import Engine, device
from trimpot.runner.pulse import PULSE
from trimpot.runner.types import Plan


def answer_prompts(
    plan: Plan, engine: Engine, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """The text that the model adds to each prompt, given as tokens. Every worker must call."""
    folder = hub.fetch_model(plan.model_path, plan.config.model.revision)
    tokenizer = hub.Tokenizer(Path(folder))
    engine.inner.eval()
    answers = [
        tokenizer.decode(generate(engine.module, prompt, tokenizer, max_new_tokens))
        for prompt in prompts
    ]
    engine.inner.train()
    return answers


def generate(
    model: torch.nn.Module, ids: list[int], tokenizer: hub.Tokenizer, max_new_tokens: int
) -> list[int]:
    """Token ids that follow `ids`, greedily, up to the end-of-sequence token."""
    PULSE.enter("answer")
    prompt = torch.tensor([ids], device=device())
    with torch.no_grad():
        output = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.inner.eos_token_id,
            eos_token_id=tokenizer.inner.eos_token_id,
        )
    return output[0][len(ids) :].tolist()

"""All hostile inputs."""

from __future__ import annotations

from dataclasses import replace

from hostile_data import data
from hostile_files import adapters, ggufs, recipes
from hostile_inputs import Input
from hostile_models import models, tokenizers
from hostile_runs import checkpoints, runs
from hostile_templates import templates
from hostile_yaml import numbers, secrets, yamls

KINDS = (
    templates, yamls, numbers, secrets, models, tokenizers, data, checkpoints, runs, adapters,
    ggufs, recipes,
)  # fmt: skip


def all_inputs() -> list[Input]:
    return [replace(given, kinds=kind.__name__) for kind in KINDS for given in kind()]

"""Tiny random checkpoints, written by transformers once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

Saved = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="session")
def save_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[PreTrainedConfig], Saved]:
    """Makes a random model of a config and saves it: its folder and transformers' own model."""
    logging.disable_progress_bar()

    def save(config: PreTrainedConfig, cls: type = AutoModelForCausalLM) -> Saved:
        torch.manual_seed(0)
        build = cls.from_config if cls is AutoModelForCausalLM else cls
        model = build(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights start at one, biases at zero: both would hide mistakes.
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        folder = tmp_path_factory.mktemp(config.model_type)
        model.save_pretrained(folder)
        return folder, model

    return save

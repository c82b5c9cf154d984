"""Every family against transformers' own model, in float32."""

from collections.abc import Callable

import pytest
import torch
from tests.shard.models.parity import (
    relative_error_in_bfloat16,
    runner_of,
    worst_difference,
)
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    Starcoder2Config,
)

# Windows are shorter than the prompts (23, 9 and 17 tokens); heads share keys in threes.
SMALL = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 4.0],
    "partial_rotary_factor": 0.75,
}

GEMMA = SMALL | {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama biased, tied": LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama wide heads": LlamaConfig(**SMALL, head_dim=16),
    "llama 3.1": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama yarn": LlamaConfig(**SMALL, rope_parameters=YARN),
    "llama yarn untruncated": LlamaConfig(
        **SMALL,
        rope_parameters=YARN | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 1.0},
    ),
    "llama linear": LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "llama dynamic": LlamaConfig(**SMALL, rope_parameters=DYNAMIC),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "mistral without window": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 windowed": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "qwen3 biased": Qwen3Config(**SMALL, head_dim=16, attention_bias=True),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    "gemma3_text": Gemma3TextConfig(**GEMMA, sliding_window_pattern=2),
    "gemma3_text linear": Gemma3TextConfig(
        **GEMMA,
        sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "phi3": Phi3Config(**SMALL, sliding_window=7),
    "phi3 short": Phi3Config(
        **SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=64
    ),
    "phi3 long": Phi3Config(**SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=8),
    "granite": GraniteConfig(
        **SMALL,
        attention_multiplier=0.3,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=3.0,
    ),
    "olmo2": Olmo2Config(**SMALL),
    "starcoder2": Starcoder2Config(**SMALL, sliding_window=6),
    "starcoder2 unbiased": Starcoder2Config(**SMALL, use_bias=False, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_matches_transformers(name: str, save_checkpoint: Callable[..., tuple]) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    assert worst_difference(folder, reference) < 1e-4


def test_gemma3_with_a_vision_tower_matches_transformers(
    save_checkpoint: Callable[..., tuple],
) -> None:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    text = Gemma3TextConfig(**GEMMA, sliding_window_pattern=2)
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=98
    )
    folder, reference = save_checkpoint(config, Gemma3ForConditionalGeneration)
    assert worst_difference(folder, reference) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "starcoder2"])
def test_a_chunk_without_logits_leaves_the_same_cache(
    name: str, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, _ = save_checkpoint(CONFIGS[name])
    caches = []
    for is_silent in (False, True):
        runner = runner_of(folder)
        sequence = runner.add(range(30))
        (runner.step_without_logits if is_silent else runner.step)((sequence, 30))
        caches += [torch.stack((*runner.cache.keys, *runner.cache.values))]
    assert torch.equal(*caches)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "granite", "olmo2", "starcoder2"])
def test_a_family_runs_in_bfloat16(name: str, save_checkpoint: Callable[..., tuple]) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    assert relative_error_in_bfloat16(folder, reference) < 0.05

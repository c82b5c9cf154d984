"""The transformers path against transformers' own attention, in float32; and who is refused."""

from collections.abc import Callable

import pytest
from tests.shard.models.parity import relative_error_in_bfloat16, worst_difference
from transformers import (
    DeepseekV3Config,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

SMALL = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=99,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # Has the interface since transformers 5.24.
    "gptj": GPTJConfig(
        vocab_size=99,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_positions=64,
        rotary_dim=8,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=24),
    "phi": PhiConfig(**GROUPED),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=6),
    "qwen3_moe": Qwen3MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16
    ),
    "gpt_oss": GptOssConfig(
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "truncate": False,
        },
    ),
    "gemma": GemmaConfig(**GROUPED, head_dim=16),
    "deepseek_v3": DeepseekV3Config(
        **SMALL,
        num_key_value_heads=6,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_matches_itself(name: str, save_checkpoint: Callable[..., tuple]) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    assert worst_difference(folder, reference) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi"])
def test_a_model_runs_in_bfloat16(name: str, save_checkpoint: Callable[..., tuple]) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    assert relative_error_in_bfloat16(folder, reference) < 0.05


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_near_a_tie_do_not_stop_a_model_in_bfloat16(
    name: str, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    assert relative_error_in_bfloat16(folder, reference) < 0.5

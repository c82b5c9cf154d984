"""Gemma 3, text only: one rope for windowed layers, one for the others (arXiv:2503.19786)."""

from dataclasses import replace

from kagami_shard.models import gemma2
from kagami_shard.models.config import Config
from kagami_shard.models.spec import LayerSpec, ModelSpec, QKNorm, rope_of

# A checkpoint with a vision tower keeps the text model one level down, in either order.
PREFIXES = ("model.", "language_model.model.", "model.language_model.")

ROPES = ("full_attention", "sliding_attention")


def spec(config: Config, max_length: int) -> ModelSpec:
    """Of `gemma3_text`, or of the text half of `gemma3`."""
    text = config.get_text_config()
    return gemma2.spec(
        text,
        max_length,
        model_type=config.model_type,
        names=replace(gemma2.NAMES, prefixes=PREFIXES),
        qk_norm=QKNorm.PER_HEAD,
        # transformers knows the field but never applies it to Gemma 3's scores.
        attention_softcap=None,
        layers=tuple(
            LayerSpec(text.sliding_window if kind == ROPES[1] else None, ROPES.index(kind))
            for kind in text.layer_types
        ),
        ropes=tuple(rope_of(text, max_length, kind) for kind in ROPES),
    )

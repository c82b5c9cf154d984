"""A one-layer random model for the engine's tests: real attention, nothing to load."""

import torch
from torch import Tensor

from kagami_shard.backends.torch.runner import TorchBackend
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import LayerShape
from kagami_shard.forward.output import Output, OutputKind
from kagami_shard.layers.attention import AttentionSpec, AttentionStep

CPU = torch.device("cpu")
VOCAB = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


class TinyModel:
    """Token and position embedding, attention, head; float32, seeded."""

    model_type = "tiny"
    layers = (LayerShape(KV_HEADS, HEAD_DIM, HEAD_DIM),)
    vocab_size = VOCAB
    max_positions = 256
    bytes_loaded = 0
    quantization = ""
    weight_bytes = 1000

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        width = HEADS * HEAD_DIM
        self.embedding = random(VOCAB, width)
        self.position = random(self.max_positions, width)
        self.qkv = random((HEADS + 2 * KV_HEADS) * HEAD_DIM, width) * 0.3
        self.head = random(VOCAB, width)
        self.fail_at: int | None = None
        """A forward pass over this token id raises"""
        self.nan_at: int | None = None
        """The output after this token id is not finite"""

    def forward(self, batch: ForwardBatch, attend: AttentionStep, wanted: OutputKind) -> Output:
        if self.fail_at is not None and (batch.input_ids == self.fail_at).any():
            raise RuntimeError("the kernel broke")
        hidden = self.embedding[batch.input_ids] + self.position[batch.positions]
        projected = (hidden @ self.qkv.T).view(batch.num_tokens, -1, HEAD_DIM)
        query, key, value = projected.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        output = attend(query, key, value, AttentionSpec(layer=0, scale=HEAD_DIM**-0.5))
        hidden = hidden + output.flatten(1)
        if self.nan_at is not None:
            hidden[batch.input_ids == self.nan_at] = float("nan")
        rows = hidden[batch.selected_rows]
        return Output(
            logits=rows @ self.head.T if OutputKind.LOGITS in wanted else None,
            vectors=rows if OutputKind.VECTORS in wanted else None,
        )


def tiny_backend(model: TinyModel | None = None, device: torch.device = CPU) -> TorchBackend:
    """The torch backend of a `TinyModel` whose weights lie on `device`."""
    model = model or TinyModel()
    return TorchBackend(model, model.forward, dtype=torch.float32, device=device)

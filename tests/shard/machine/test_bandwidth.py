import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kagami_shard.forward.kv_cache import LayerShape
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Linear
from kagami_shard.machine import bandwidth
from kagami_shard.machine.bandwidth import read_bandwidth, read_cost, weight_bytes

TABLE = torch.zeros(10, 4)


@dataclass(frozen=True, slots=True)
class Quantized:
    values: Tensor
    scales: Tensor


class Model:
    def __init__(self, head: Tensor) -> None:
        self.embedding = Embedding(TABLE)
        self.layers = [Linear(torch.zeros(3, 4)), Quantized(torch.zeros(5).byte(), torch.zeros(1))]
        self.fused = self.layers[0].weight[:2]
        self.head = Head(Linear(head), 10)
        self.itself = self


def test_every_storage_counts_once_and_tables_of_rows_do_not() -> None:
    assert weight_bytes(Model(torch.zeros(10, 4))) == 4 * 12 + 5 + 4 + 4 * 40


def test_a_table_that_is_the_head_too_is_read_whole() -> None:
    assert weight_bytes(Model(TABLE)) == 4 * 12 + 5 + 4 + 4 * 40


def test_a_weight_outside_of_torch_says_what_it_takes() -> None:
    packed = SimpleNamespace(num_bytes=100, bias=torch.zeros(2))
    assert weight_bytes([packed, packed]) == 108


def test_a_module_counts_its_parameters_and_buffers() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
    module.register_buffer("scale", torch.zeros(1))
    assert weight_bytes(module) == 4 * (8 + 2 + 1)


def test_a_token_costs_its_keys_and_values_in_every_layer() -> None:
    layers = (LayerShape(2, 8, 8), LayerShape(2, 8, 4))
    cost = read_cost(Model(TABLE), layers, torch.bfloat16, 1e9)
    assert (cost.kv_token_bytes, cost.bandwidth) == (2 * (32 + 24), 1e9)


def test_without_memory_for_a_buffer_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_CPU_BYTES", 1 << 60)
    assert read_bandwidth(torch.device("cpu")) == 0


def test_the_bandwidth_is_one_that_a_machine_can_have_and_soon_known() -> None:
    started = time.monotonic()
    assert 1e8 < read_bandwidth(torch.device("cpu")) < 1e13
    assert time.monotonic() - started < 10  # 0.2 s on an idle machine

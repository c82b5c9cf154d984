from tests.fakes.tiny_model import HEAD_DIM, KV_HEADS, TinyModel, tiny_backend

from kagami_shard.engine.read_cost import read_cost


def test_a_token_costs_its_keys_and_values_in_every_layer() -> None:
    cost = read_cost(tiny_backend(), 1e9)
    assert (cost.weight_bytes, cost.bandwidth) == (TinyModel.weight_bytes, 1e9)
    assert cost.kv_token_bytes == len(TinyModel.layers) * 2 * KV_HEADS * HEAD_DIM * 4

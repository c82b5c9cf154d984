"""A LoRA adapter is merged into its base; peft itself is the judge where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.run import Task, convert
from kagami_launcher.model import folder as model_folder
from kagami_launcher.model import source as hub
from kagami_proto.model_files import BrokenFile, read_object

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH, ROWS, RANK = 6, 10, 2
LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5, "base_model_name_or_path": "base"}


def base_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    names = {f"{Q}.weight": WIDTH, f"{K}.weight": WIDTH, EMBED: ROWS, HEAD: ROWS}
    return {name: torch.randn(rows, WIDTH).bfloat16() for name, rows in names.items()}


def pair(module: str, rows: int = WIDTH, rank: int = RANK) -> dict[str, Tensor]:
    key = f"base_model.model.{module}"
    return {
        f"{key}.lora_A.weight": torch.randn(rank, WIDTH),
        f"{key}.lora_B.weight": torch.randn(rows, rank),
    }


def write_base(folder: Path, weights: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir()
    settings = {"model_type": "llama", "vocab_size": ROWS, "hidden_size": WIDTH, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    save_file(base_weights() if weights is None else weights, folder / "model.safetensors")
    return folder


def write_adapter(folder: Path, base: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    settings = {**LORA, "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def merged(adapter: Path) -> tuple[Path, dict[str, Tensor]]:
    """As the launcher does it: resolve, convert, resolve again."""
    cache = adapter.parent / "hub"
    source = hub.resolve(str(adapter), revision=None, cache=cache)
    assert source.origin == adapter
    convert(Task(adapter, source.folder, source.base))
    assert hub.resolve(str(adapter), revision=None, cache=cache) == source
    assert source.is_ready
    found = {}
    for file in source.folder.glob("*.safetensors"):
        found |= load_file(file)
    return source.folder, found


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_product_is_added_with_its_scale(tmp_path: Path, use_rslora: bool) -> None:
    base, change = write_base(tmp_path / "base"), pair(Q)
    adapter = write_adapter(tmp_path / "adapter", base, change, use_rslora=use_rslora)
    folder, found = merged(adapter)
    down, up = change.values()
    scale = 5 / (RANK**0.5 if use_rslora else RANK)
    before = base_weights()
    expected = (before[f"{Q}.weight"].float() + scale * (up @ down)).bfloat16()
    assert torch.equal(found.pop(f"{Q}.weight"), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
    assert folder.parent == tmp_path / "hub" / "models--kagami--adapter" / "snapshots"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "hub"]


def test_ranks_and_scales_may_differ_by_module(tmp_path: Path) -> None:
    base, change = write_base(tmp_path / "base"), pair(Q) | pair(K, rank=3)
    patterns = {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 12}}
    _, found = merged(write_adapter(tmp_path / "adapter", base, change, **patterns))
    down, up = list(change.values())[2:]
    expected = base_weights()[f"{K}.weight"].float() + 4 * (up @ down)
    assert torch.equal(found[f"{K}.weight"], expected.bfloat16())


def test_saved_modules_replace_the_bases(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    larger = {
        "base_model.model.model.embed_tokens.weight": torch.randn(ROWS + 2, WIDTH),
        "base_model.model.lm_head.modules_to_save.weight": torch.randn(ROWS + 2, WIDTH),
    }
    folder, found = merged(write_adapter(tmp_path / "adapter", base, larger | pair(Q)))
    assert torch.equal(found[EMBED], next(iter(larger.values())).bfloat16())
    assert found[HEAD].shape == (ROWS + 2, WIDTH)
    assert read_object(folder / "config.json")["vocab_size"] == ROWS + 2


def test_a_head_of_its_own_unties_the_base(tmp_path: Path) -> None:
    weights = base_weights()
    del weights[HEAD]
    base = write_base(tmp_path / "base", weights, tie_word_embeddings=True)
    head = torch.randn(ROWS, WIDTH)
    adapter = write_adapter(tmp_path / "adapter", base, {"base_model.model.lm_head.weight": head})
    folder, found = merged(adapter)
    assert torch.equal(found[HEAD], head)
    assert read_object(folder / "config.json")["tie_word_embeddings"] is False


def test_a_base_in_pickled_shards_is_read_as_it_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    weights = base_weights()
    torch.save({EMBED: weights.pop(EMBED)}, base / "pytorch_model-00001-of-00002.bin")
    torch.save(weights, base / "pytorch_model-00002-of-00002.bin")
    before = sorted(path.name for path in base.iterdir())
    folder, found = merged(write_adapter(tmp_path / "adapter", base, pair(Q)))
    assert found.keys() == base_weights().keys()
    assert (folder / model_folder.INDEX).is_file()
    assert sorted(path.name for path in base.iterdir()) == before


def test_a_base_in_the_hub_cache_is_found(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    write_base(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    adapter = write_adapter(tmp_path / "adapter", Path("org/name"), pair(Q))
    assert f"{Q}.weight" in merged(adapter)[1]


def test_the_adapters_tokenizer_is_taken(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, pair(Q))
    (adapter / "tokenizer.json").write_text('{"mine": 1}')
    (base / "tokenizer_config.json").write_text("{}")
    folder, _ = merged(adapter)
    assert json.loads((folder / "tokenizer.json").read_text()) == {"mine": 1}
    assert not (folder / "tokenizer_config.json").exists()


def test_another_adapter_is_another_folder(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, pair(Q))
    first, _ = merged(adapter)
    save_file(pair(Q), adapter / "adapter_model.safetensors")
    assert merged(adapter)[0] != first


@pytest.mark.parametrize(
    ("weights", "config", "why"),
    [
        (pair("model.layers.9.q_proj"), {}, "changes `model.layers.9.q_proj.weight`, and the base"),
        (pair(Q, rows=WIDTH + 1), {}, r"is \[6, 6\] in the base model, and its adapter \[7, 6\]"),
        (pair(Q), {"peft_type": "IA3"}, "adapters of type `IA3`"),
        (pair(Q), {"init_lora_weights": "pissa"}, "`init_lora_weights` `pissa`"),
        (pair(Q), {"layer_replication": [[0, 1]]}, "`layer_replication`"),
        ({f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 6)}, {}, "is not two matrices"),
    ],
)
def test_what_cannot_be_merged_wholly_is_refused(
    tmp_path: Path, weights: dict[str, Tensor], config: dict[str, Any], why: str
) -> None:
    base = write_base(tmp_path / "base")
    with pytest.raises(ConversionRefused, match=why):
        merged(write_adapter(tmp_path / "adapter", base, weights, **config))
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_an_update_of_a_tied_head_is_not_lost_in_silence(tmp_path: Path) -> None:
    weights = base_weights()
    del weights[HEAD]
    base = write_base(tmp_path / "base", weights, tie_word_embeddings=True)
    with pytest.raises(ConversionRefused, match=r"changes `lm_head\.weight`, and the base"):
        merged(write_adapter(tmp_path / "adapter", base, pair("lm_head", rows=ROWS)))


def shapes(down: tuple[int, ...], up: tuple[int, ...], **more: Tensor) -> dict[str, Tensor]:
    key = f"base_model.model.{Q}"
    return {
        f"{key}.lora_A.weight": torch.ones(down),
        f"{key}.lora_B.weight": torch.ones(up),
        **{f"{key}.{name}": tensor for name, tensor in more.items()},
    }


MAGNITUDE = {"lora_magnitude_vector": torch.ones(WIDTH + 1)}
NEW_Q = {f"base_model.model.{Q}.weight": torch.ones(WIDTH, WIDTH + 1)}
NEW_EMBED = {"base_model.model.model.embed_tokens.weight": torch.ones(ROWS, WIDTH + 1)}
NO_EMBED = {"base_model.model.model.embed_tokens.weight": torch.ones(0, WIDTH)}


@pytest.mark.parametrize(
    ("weights", "config", "why"),
    [
        (shapes((0, WIDTH), (WIDTH, 0)), {}, "their rank differs, or is 0"),
        (shapes((2, WIDTH), (WIDTH, 3)), {}, "their rank differs, or is 0"),
        (shapes((1, 10**6), (10**6, 1)), {}, r"adapter \[1000000, 1000000\]"),  # 4 TB
        (shapes((2,), (WIDTH, 2)), {}, "is not two matrices"),
        (shapes((2, WIDTH, 1), (WIDTH, 2, 1)), {}, "is not two matrices"),
        (shapes((2, WIDTH), (WIDTH, 2), **MAGNITUDE), {}, r"its magnitude \[7\]"),
        (pair(Q) | NEW_Q, {}, r"adapter \[6, 6\]"),
        (NEW_Q, {}, r"in the adapter \[6, 7\]"),
        (NEW_EMBED, {}, r"in the adapter \[10, 7\]"),
        (NO_EMBED, {}, r"in the adapter \[0, 6\]"),
        (pair(Q), {"lora_alpha": "8"}, "alpha of .* is `8`, expected a number"),
        (pair(Q), {"lora_alpha": float("nan")}, "alpha of .* is nan, expected a number"),
        (pair(Q), {"lora_alpha": float("inf")}, "alpha of .* is inf, expected a number"),
        (pair(Q), {"lora_alpha": 10**300}, "alpha of .*, expected a number"),
        (pair(Q), {"lora_alpha": None}, "alpha of .* is None, expected a number"),
        (pair(Q), {"alpha_pattern": {"q_proj": []}}, "alpha of .* is a list of 0"),
        (pair(Q), {"alpha_pattern": {"(.*a)+b": 1}}, "adapter_config.json: the pattern .* is not"),
        (pair(Q), {"alpha_pattern": ["q_proj"]}, "`alpha_pattern` of adapter_config.json is a li"),
        (pair(Q), {"peft_type": ["LORA"]}, "adapters of type a list of 1"),
        (pair(Q), {"init_lora_weights": {}}, "`init_lora_weights` a dict of 0"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_before_it_is_multiplied(
    tmp_path: Path, weights: dict[str, Tensor], config: dict[str, Any], why: str
) -> None:
    base = write_base(tmp_path / "base")
    with pytest.raises(ConversionRefused, match=why) as refusal:
        merged(write_adapter(tmp_path / "adapter", base, weights, **config))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", bytes(16), b"\xff" * 16, (1 << 40).to_bytes(8, "little")])
@pytest.mark.parametrize("broken", ["adapter", "base"])
def test_a_broken_file_of_weights_is_named(tmp_path: Path, content: bytes, broken: str) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, pair(Q))
    (path,) = (tmp_path / broken).glob("*.safetensors")
    path.write_bytes(content)
    with pytest.raises((ConversionRefused, BrokenFile), match=str(path)):
        merged(adapter)


def test_a_dtype_that_is_none_of_weights_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, pair(Q))
    header = {"a": {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}}
    content = json.dumps(header).encode()
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(64))
    with pytest.raises(ConversionRefused, match=r"adapter_model\.safetensors: `a` has dtype F4"):
        merged(adapter)


def test_an_adapter_of_itself_is_one_clear_line(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "adapter", pair(Q))
    with pytest.raises(hub.ModelNotFound, match="is an adapter itself"):
        merged(adapter)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\nb", "~nobody", "/etc", "a/b/c", ".."])
def test_a_base_that_is_no_model_is_one_clear_line(tmp_path: Path, name: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", tmp_path, pair(Q), base_model_name_or_path=name)
    with pytest.raises(hub.ModelNotFound) as refusal:
        merged(adapter)
    assert not set(str(refusal.value)) & {"\n", "\0"}
    assert len(str(refusal.value)) < 400


def test_adapters_of_one_another_are_one_clear_line(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", tmp_path / "two", pair(Q))
    write_adapter(tmp_path / "two", tmp_path / "one", pair(Q))
    with pytest.raises(hub.ModelNotFound, match="is an adapter itself"):
        merged(one)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../b", "..", "x" * 300, "a\0b", 5, []])
def test_a_revision_of_the_base_that_leads_elsewhere_is_refused(
    tmp_path: Path, revision: object
) -> None:
    adapter = write_adapter(tmp_path / "adapter", Path("org/x"), pair(Q), revision=revision)
    with pytest.raises(hub.ModelNotFound, match="`revision` of adapter_config"):
        merged(adapter)


def test_an_adapter_without_its_base_is_one_clear_line(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Path("org/none"), pair(Q))
    with pytest.raises(hub.ModelNotFound, match=f"the base model of the adapter {adapter}: model"):
        merged(adapter)


@pytest.mark.filterwarnings("default")  # peft's own
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["v_proj"], "use_rslora": True, "use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
        ("llama", {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 32}}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_peft_merges_the_same(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 50, "intermediate_size": 48, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    base = tmp_path / "base"
    model.save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    model.name_or_path = str(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))
    for name, weight in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    folder, _ = merged(tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    theirs = adapted.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5)

"""Patterns over module names give what peft's regular expressions give, in bounded work."""

import re

import pytest

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.module_patterns import ModulePatterns

MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.11.mlp.down_proj",
    "model.decoder.layers.0.encoder_attn.k_proj",
    "lm_head",
    "q_proj",
    "xq_proj",
)
PATTERNS = (
    "q_proj",
    "self_attn.q_proj",
    r"self_attn\.q_proj",
    "^q_proj",
    "^model.layers.0.self_attn.q_proj$",
    "proj",
    ".*proj",
    r"model\.layers\.(0|1)\..*",
    r"layers\.\d+\.mlp\.(down|up)_proj",
    "[qk]_proj",
    "[^q]+_proj",
    "(?:q|k)_proj",
    r"layers\.1{2}\..*_proj",
    r"layers\.\d{1,2}.mlp.*",
    r"layers\.[0-9]{3,}.*",
    "(q|k|v)?_?proj",
    "lm_head|q_proj",
    "x?q_proj",
    "xq??_proj",
    "",
    ".+",
    "mod.*attn.*_proj",
    "(a|)q_proj",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_peft_matches(pattern: str) -> None:
    patterns = ModulePatterns({pattern: "found"}, "`alpha_pattern`")
    for module in MODULES:
        expected = "found" if re.match(rf"(.*\.)?({pattern})$", module) else "default"
        assert patterns.value(module, "default") == expected, module


def test_the_first_pattern_that_matches_counts() -> None:
    for first, second in (("q_proj", ".*proj"), (".*proj", "q_proj"), ("q_proj", "attn.q_proj")):
        patterns = ModulePatterns({first: 1, second: 2}, "`alpha_pattern`")
        assert patterns.value("attn.q_proj", 0) == 1


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "((a*)*)*b", "(.*a){50}", r"(\w+\.?)*x", "(a|b?)+c", "a**", "a?" * 1000),
        *(r"(a)\1", "(?=a)a", "(?<!x)a", "(?i)a", r"\bq", "(" * 100 + "a" + ")" * 100),
        *("(", ")", "[a", "+", "a{9999}", "a{"),
    ],
)
def test_what_could_run_without_end_or_is_not_known_is_refused(pattern: str) -> None:
    with pytest.raises(ConversionRefused, match=r"`alpha_pattern`: the pattern .* is not"):
        ModulePatterns({pattern: 1}, "`alpha_pattern`")


def test_work_has_a_bound_whatever_the_patterns_are() -> None:
    many = {".*a" * 300 + f"{number}": 1 for number in range(50)}
    patterns = ModulePatterns(many, "`alpha_pattern`")
    names = (f"{'a' * 900}.{number}b" for number in range(1000))
    with pytest.raises(ConversionRefused, match="takes more than 10000000 steps"):
        [patterns.value(name, 0) for name in names]


def test_numbers_and_names_have_limits() -> None:
    with pytest.raises(ConversionRefused, match="more than 1000 expressions"):
        ModulePatterns({f"a*{number}": 1 for number in range(2000)}, "`alpha_pattern`")
    with pytest.raises(ConversionRefused, match="has 5000000 characters, the limit is 1000"):
        ModulePatterns({}, "`alpha_pattern`").value("." * 5_000_000, 0)


def test_a_pattern_for_each_module_of_a_large_model_is_looked_up() -> None:
    modules = [f"model.layers.{layer}.mlp.experts.{n}.up" for layer in range(60) for n in range(64)]
    patterns = ModulePatterns({module: number for number, module in enumerate(modules)}, "here")
    assert [patterns.value(module, -1) for module in modules] == list(range(len(modules)))

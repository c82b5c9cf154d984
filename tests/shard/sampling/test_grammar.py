import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start

from kagami_proto.errors import InvalidRequest
from kagami_proto.values import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from kagami_shard.sampling.grammar import MAX_KEPT, MAX_KEPT_BYTES, Grammars, GrammarState

TOKENIZER = byte_tokenizer_with_start()
VOCAB = TOKENIZER.get_vocab_size()
EOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    TOKENIZER.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def grammars(folder: Path) -> Iterator[Grammars]:
    made = Grammars(folder, vocab_size=VOCAB + 7, eos_token_ids=[EOS])
    yield made
    made.close()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


def schema(value: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value))


def patterns(count: int) -> dict[str, object]:
    return {"patternProperties": {f"^{n}[a-z]+$": {"type": "null"} for n in range(count)}}


def tools(*schemas: object) -> Grammar:
    rules = [f"call_{n}: %json {json.dumps(one)}" for n, one in enumerate(schemas)]
    names = " | ".join(f"call_{n}" for n in range(len(schemas)))
    return Grammar(GrammarKind.LARK, "\n".join([f"start: {names}", *rules]))


def allowed_ids(grammars: Grammars, *states: GrammarState | None) -> list[list[int]]:
    with grammars.filling(states) as masks:
        pass
    banned = masks.result()
    assert banned is not None
    assert banned.mask.shape == (len(banned.rows), VOCAB + 7)
    return [(~row).nonzero()[:, 0].tolist() for row in banned.mask]


def accepts(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    """Whether a sequence could say just this text and end."""
    state = grammars.start(grammar, [])
    for token_id in ids_of(text):
        if token_id not in allowed_ids(grammars, state)[0]:
            return False
        state.take(token_id)
    return EOS in allowed_ids(grammars, state)[0]


def test_only_what_continues_the_grammar_is_allowed(grammars: Grammars) -> None:
    state = grammars.start(regex("a(b|c)"), [])

    assert allowed_ids(grammars, state) == [ids_of("a")]
    state.take(ids_of("a")[0])
    assert sorted(allowed_ids(grammars, state)[0]) == sorted(ids_of("bc"))


def test_a_complete_output_can_only_end(grammars: Grammars) -> None:
    state = grammars.start(regex("ab"), ids_of("ab"))

    assert allowed_ids(grammars, state) == [[EOS]]


def test_after_its_end_a_sequence_can_only_end_again(grammars: Grammars) -> None:
    state = grammars.start(regex("ab"), [*ids_of("ab"), EOS])

    assert allowed_ids(grammars, state) == [[EOS]]
    assert state.error == ""


def test_rows_without_a_grammar_are_left_out(grammars: Grammars) -> None:
    one, two = grammars.start(regex("a"), []), grammars.start(regex("b"), [])
    with grammars.filling([None, one, None, two]) as masks:
        pass
    banned = masks.result()
    assert banned is not None
    assert list(banned.rows) == [1, 3]
    assert [(~row).nonzero()[:, 0].tolist() for row in banned.mask] == [ids_of("a"), ids_of("b")]


def test_a_step_without_grammars_has_no_masks(grammars: Grammars) -> None:
    with grammars.filling([None, None]) as masks:
        assert masks.result() is None


def test_two_sequences_of_one_grammar_stand_alone(grammars: Grammars) -> None:
    one, two = grammars.start(regex("ab"), []), grammars.start(regex("ab"), [])
    one.take(ids_of("a")[0])

    assert allowed_ids(grammars, one, two) == [ids_of("b"), ids_of("a")]


def test_a_token_against_the_grammar_is_an_error_of_its_sequence(grammars: Grammars) -> None:
    state, neighbour = grammars.start(regex("ab"), []), grammars.start(regex("ab"), [])
    state.take(ids_of("z")[0])

    assert "doesn't satisfy the grammar" in state.error
    assert neighbour.error == ""


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        ('{"a":1,"b":["x"]}', True),
        ('{"a": 1, "b": ["x", "y"]}', True),
        ('{"a":  1,"b":[]}', False),
        ('{"a":1,\n"b":[]}', False),
        ('{"a":1}', False),
        ('{"a":"1","b":[]}', False),
    ],
)
def test_json_has_at_most_one_space_between_tokens(
    grammars: Grammars, text: str, is_accepted: bool
) -> None:
    grammar = schema(
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "array", "items": {"$ref": "#/$defs/text"}},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"text": {"type": "string"}},
        }
    )
    assert accepts(grammars, grammar, text) is is_accepted


def test_one_of_is_read_as_any_of(grammars: Grammars) -> None:
    assert accepts(grammars, schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "17")


def test_lark_is_taken_as_it_is(grammars: Grammars) -> None:
    assert accepts(grammars, Grammar(GrammarKind.LARK, 'start: "x" /[0-9]+/'), "x42")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (regex("(a"), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (schema({"type": "blah"}), "blah"),
        (schema({"$ref": "#/$defs/x"}), "/$defs/x"),
        (schema({"$ref": "#"}), "nothing obeys it"),
        (regex(r"[^\s\S]"), "nothing obeys it"),
        (schema({"$ref": "https://example.com/x.json"}), "not fetch"),
        (schema(["type"]), "object"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), ""),
        (Grammar(GrammarKind.LARK, "begin: /a/"), "start"),
        (regex("a" * (MAX_GRAMMAR_BYTES + 1)), f"more than {MAX_GRAMMAR_BYTES}"),
        (schema({"type": "integer", "multipleOf": 9_999_991}), "Given: 9999991"),
        (schema({"type": "number", "multipleOf": 0.9999991}), "Given: 0.9999991"),
        (schema({"type": "integer", "multipleOf": -999_983}), "Given: -999983"),
        (schema({"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 89, 83)]}), "83"),
        (schema({"prefixItems": [{"multipleOf": n} for n in [9973] * 3]}), "9973"),
        (Grammar(GrammarKind.LARK, 'start: %json {"multipleOf": 9999991}'), "Given: 9999991"),
        (schema(patterns(101)), "100 patterns. Given: 101"),
        (schema({"anyOf": [patterns(30), {"not": {"items": [patterns(30)] * 3}}]}), "Given: 120"),
        (schema({"properties": {"patternProperties": patterns(101)}}), "Given: 102"),
        (tools(*[patterns(40)] * 3), "Given: 120"),
        (schema({"properties": {f"p{n}": {} for n in range(1500)}, "type": "object"}), "items"),
        (schema({"type": "string", "enum": [f"value{n}" for n in range(20_000)]}), "bytes"),
    ],
)
def test_what_cannot_be_compiled_says_why_on_one_line(
    grammars: Grammars, grammar: Grammar, reason: str
) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(InvalidRequest) as failure:
            grammars.compile(grammar)
        assert reason in str(failure.value)
        assert "\n" not in str(failure.value)


def test_multiples_of_several_numbers_do_not_multiply(grammars: Grammars) -> None:
    grammars.compile(schema({"prefixItems": [{"multipleOf": n} for n in (15, 24, 365, 97)]}))


def test_multiples_are_held(grammars: Grammars) -> None:
    grammar = schema({"type": "integer", "multipleOf": 7000})
    assert accepts(grammars, grammar, "21000")
    assert not accepts(grammars, grammar, "2000")


def test_a_bad_grammar_asked_for_again_and_again_keeps_nothing_of_those_who_asked(
    grammars: Grammars,
) -> None:
    def depth() -> int:
        with pytest.raises(InvalidRequest) as failure:
            grammars.compile(regex("(a"))
        return len(failure.traceback)

    depth()
    assert depth() == depth()


def test_a_grammar_that_is_too_large_is_not_cached(grammars: Grammars) -> None:
    kept = grammars.compile(regex("first"))
    for number in range(MAX_KEPT):
        with pytest.raises(InvalidRequest):
            grammars.compile(regex(f"{number}" * (MAX_GRAMMAR_BYTES + 1)))
    assert grammars.compile(regex("first")) is kept


def test_a_grammar_is_compiled_once_whoever_asks(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Grammar] = []
    original = grammars._compiled
    monkeypatch.setattr(
        grammars, "_compiled", lambda grammar: (compiled.append(grammar), original(grammar))[1]
    )
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(grammars.compile, [regex("a{1,9}")] * 32))
    assert len(compiled) == 1


def test_the_grammar_not_used_for_longest_is_forgotten(grammars: Grammars) -> None:
    kept = grammars.compile(regex("first"))
    for number in range(MAX_KEPT - 1):
        grammars.compile(regex(f"x{number}"))
        assert grammars.compile(regex("first")) is kept
    for number in range(MAX_KEPT):
        grammars.compile(regex(f"y{number}"))
    assert grammars.compile(regex("first")) is not kept


def test_large_grammars_have_a_budget_and_push_out_no_small_one(grammars: Grammars) -> None:
    def large(number: int) -> Grammar:
        return schema({"enum": [f"{number}_{n}" for n in range(5000)]})

    small = grammars.compile(regex("small"))
    first = grammars.compile(large(0))
    num_kept = MAX_KEPT_BYTES // large(0).num_bytes
    assert 4 < num_kept < 16
    for number in range(1, num_kept):
        grammars.compile(large(number))
    assert grammars.compile(large(0)) is first
    for number in range(num_kept, 2 * num_kept):
        grammars.compile(large(number))
    assert grammars.compile(large(0)) is not first
    assert grammars.compile(regex("small")) is small


@pytest.mark.parametrize("eos_token_ids", [[], [EOS]])
def test_a_model_that_can_have_no_grammars_says_so(
    tmp_path: Path, folder: Path, eos_token_ids: Sequence[int]
) -> None:
    used = tmp_path if eos_token_ids else folder
    grammars = Grammars(used, vocab_size=VOCAB, eos_token_ids=eos_token_ids)
    with pytest.raises(InvalidRequest, match="this model"):
        grammars.compile(regex("a"))
    grammars.close()


def test_a_head_narrower_than_the_vocabulary_is_served(folder: Path) -> None:
    grammars = Grammars(folder, vocab_size=VOCAB - 3, eos_token_ids=[EOS])
    with grammars.filling([grammars.start(regex("."), [])]) as masks:
        pass
    banned = masks.result()
    grammars.close()
    assert banned is not None
    assert banned.mask.shape == (1, VOCAB - 3)


def test_the_vocabulary_is_read_for_the_first_grammar_and_once(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    grammars = Grammars(tmp_path, vocab_size=VOCAB + 7, eos_token_ids=[EOS])
    TOKENIZER.save(str(file))  # behind the start of the server
    assert accepts(grammars, regex("ab"), "ab")
    file.unlink()
    assert accepts(grammars, regex("cd"), "cd")
    grammars.close()


def test_requests_without_a_grammar_read_no_vocabulary(tmp_path: Path) -> None:
    grammars = Grammars(tmp_path, vocab_size=VOCAB + 7, eos_token_ids=[EOS])
    with grammars.filling([None, None]) as masks:
        pass
    assert masks.result() is None
    assert grammars._loaded is None
    grammars.close()

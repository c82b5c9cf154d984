"""A SentencePiece `tokenizer.model` -> tokenizer.json, with the slow tokenizer's ids.

The file is a protobuf message (sentencepiece_model.proto); the few fields we need are read here, so
neither sentencepiece nor transformers is needed. The slow tokenizer does more than the model says,
and tokenizer_config.json has the rest: bos, added tokens, and `legacy`. `legacy` decides whether
every stretch of text between special tokens gets a leading space, or only the first.

What cannot be expressed is refused, or there is a warning: see launcher/notes/0006.
"""

import logging
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from kagami_launcher.convert.files import (
    ConversionRefused,
    replaced,
    shown,
    tokenizers_refusals,
)
from kagami_proto.model_files import read_optional_object

log = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_CLASSES = {"LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast"}
_ID = re.compile(r"[0-9]{1,9}")
_FLAGS = ("lstrip", "rstrip", "single_word", "special")
_SPACE = "▁"
# The largest have 262,144 pieces in 5 MB.
_MAX_PIECES, _MAX_BYTES = 1 << 20, 64 << 20
# The largest vocabulary, of 262,144 pieces, takes 2^24.
_MAX_CUT_CHARACTERS = 1 << 26

_Field = int | bytes


class Piece(NamedTuple):
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The parts of a tokenizer.model that decide about ids."""

    pieces: Sequence[Piece]
    algorithm: int
    has_byte_fallback: bool
    adds_dummy_prefix: bool
    removes_extra_spaces: bool
    has_character_map: bool


def write_tokenizer(folder: Path, destination: Path) -> None:
    """Make `destination`/tokenizer.json from `folder`'s tokenizer.model and settings."""
    path = folder / "tokenizer.model"
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ConversionRefused(f"{path} has {size} bytes, the limit is {_MAX_BYTES}")
    try:
        model = read_model(path.read_bytes())
    except (_Damaged, UnicodeDecodeError) as error:
        raise ConversionRefused(f"{path} cannot be read: {error}") from error
    settings = Settings.read(folder)
    with tokenizers_refusals(str(path)):
        tokenizer = build(model, settings)
    with replaced(destination / "tokenizer.json") as work:
        tokenizer.save(str(work))
    log.info("Made tokenizer.json from tokenizer.model")


# --- reading the file -----------------------------------------------------------------------------


class _Damaged(Exception):
    """The file is no message of this kind."""


def read_model(data: bytes) -> SentencePieceModel:
    """Parse a tokenizer.model; fields that are absent have the .proto's defaults."""
    pieces: list[Piece] = []
    trainer: dict[int, _Field] = {}
    normalizer: dict[int, _Field] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(len(pieces), dict(_fields(_bytes(value)))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    return SentencePieceModel(
        pieces,
        algorithm=_number(trainer.get(3, _UNIGRAM)),
        has_byte_fallback=bool(trainer.get(35, 0)),
        adds_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
        has_character_map=bool(normalizer.get(2, b"")),
    )


def _piece(index: int, fields: Mapping[int, _Field]) -> Piece:
    if index == _MAX_PIECES:
        raise _Damaged(f"it has more than {_MAX_PIECES} pieces")
    stored = _bytes(fields.get(2, b"\0\0\0\0"))
    if len(stored) != 4 or not math.isfinite(score := struct.unpack("<f", stored)[0]):
        raise _Damaged(f"piece {index} has a score of {shown(stored)}")
    return Piece(_bytes(fields.get(1, b"")).decode(), score, _number(fields.get(3, _NORMAL)))


def _bytes(value: _Field) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged(f"it has {shown(value)} in place of bytes")
    return value


def _number(value: _Field) -> int:
    if not isinstance(value, int):
        raise _Damaged(f"it has {shown(value)} in place of a number")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, _Field]]:
    """Field numbers and values of a protobuf message: varints as int, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case wire_type:
                raise _Damaged(f"wire type {wire_type} at byte {at} of a message")
        if at + size > len(data):
            raise _Damaged(f"a field of {size} bytes, and its message has {len(data) - at} more")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # 64 bits take ten bytes
        if at >= len(data):
            raise _Damaged("it ends in the middle of a number")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise _Damaged(f"a number of more than 64 bits at byte {at} of a message")


# --- what stands beside it ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """The slow tokenizer's own part: tokenizer_config.json and its companions."""

    bos: str = "<s>"
    eos: str = "</s>"
    adds_bos: bool = True
    adds_eos: bool = False
    is_legacy: bool = True
    adds_prefix_space: bool = True
    added: Mapping[int, AddedToken] | None = None
    specials: frozenset[str] = frozenset()

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """The settings of a model folder; a tokenizer of another class is refused."""
        config = read_optional_object(folder / "tokenizer_config.json")
        named = {**read_optional_object(folder / "special_tokens_map.json"), **config}
        kind = config.get("tokenizer_class") or "LlamaTokenizer"
        if not isinstance(kind, str) or kind not in _CLASSES:
            raise ConversionRefused(
                f"there is no tokenizer.json, and tokenizer class {shown(kind)} is not one that is "
                f"known to make one from tokenizer.model ({', '.join(sorted(_CLASSES))})"
            )
        added = _added_tokens(config)
        for text, token_id in read_optional_object(folder / "added_tokens.json").items():
            if type(token_id) is not int:
                raise ConversionRefused(f"added_tokens.json: {shown(text)} is {shown(token_id)}")
            added.setdefault(token_id, AddedToken(text, normalized=False))
        is_gemma = kind.startswith("Gemma")
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        specials = [text for role in roles if (text := _text(named.get(role)))]
        more = named.get("additional_special_tokens")
        specials += [_text(token) for token in (more if isinstance(more, list) else ())]
        return cls(
            bos=_text(named.get("bos_token")) or ("<bos>" if is_gemma else "<s>"),
            eos=_text(named.get("eos_token")) or ("<eos>" if is_gemma else "</s>"),
            adds_bos=config.get("add_bos_token", True),
            adds_eos=config.get("add_eos_token", False),
            is_legacy=config.get("legacy", True) is not False,
            adds_prefix_space=config.get("add_prefix_space", True) is not False,
            added=added,
            specials=frozenset(specials),
        )


def _text(token: object) -> str:
    """A special token is written as text or as `{"content": text, …}`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _added_tokens(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """By their ids. A slow tokenizer looks for them in the text before normalization."""
    found: dict[int, AddedToken] = {}
    written = config.get("added_tokens_decoder") or {}
    if not isinstance(written, dict):
        raise ConversionRefused(f"`added_tokens_decoder` is {shown(written)}, expected an object")
    for token_id, value in written.items():
        if not _ID.fullmatch(token_id) or not (text := _text(value)):
            raise ConversionRefused(f"`added_tokens_decoder`: {shown(token_id)} is {shown(value)}")
        flags = {name: value.get(name) is True for name in _FLAGS} if text is not value else {}
        found[int(token_id)] = AddedToken(text, normalized=False, **flags)
    return found


# --- building -------------------------------------------------------------------------------------


def build(model: SentencePieceModel, settings: Settings) -> Tokenizer:
    """The fast tokenizer that gives the ids of the slow one."""
    _refuse_what_differs(model, settings)
    tokenizer = Tokenizer(_bpe(model))
    adds_space = model.adds_dummy_prefix and (settings.is_legacy or settings.adds_prefix_space)
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if adds_space and settings.is_legacy:
        steps.insert(0, normalizers.Prepend(_SPACE))
    if adds_space and not settings.is_legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first", split=False
        )
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*undo, decoders.Strip(" ", 1, 0)] if adds_space else undo
    )
    _add_tokens(tokenizer, model, settings)
    _frame(tokenizer, settings)
    return tokenizer


def _refuse_what_differs(model: SentencePieceModel, settings: Settings) -> None:
    kinds = Counter(piece.kind for piece in model.pieces)
    if model.algorithm != _BPE:  # equal scores would be decided otherwise
        raise ConversionRefused("tokenizer.model does not split by merges (BPE)")
    if model.has_character_map or model.removes_extra_spaces:
        raise ConversionRefused(
            "tokenizer.model normalizes text before it splits it, which tokenizer.json "
            "cannot do in the same way"
        )
    if kinds[_UNUSED]:
        raise ConversionRefused(f"tokenizer.model has {kinds[_UNUSED]} unused pieces")
    if kinds[_USER_DEFINED] and model.adds_dummy_prefix and settings.is_legacy:
        raise ConversionRefused(
            "tokenizer.model has user-defined pieces and adds a leading space: "
            "tokenizer.json would add one after each of them"
        )
    known = {piece.text for piece in model.pieces if piece.kind == _NORMAL}
    lost = [text for text in known if len(text) > 1 and not known.issuperset(text)]
    if lost:
        log.warning("%s pieces are never used: their characters are no pieces", len(lost))


def _bpe(model: SentencePieceModel) -> models.BPE:
    # Control, unknown and byte pieces are never the result of a merge.
    normal = {
        piece.text: index for index, piece in enumerate(model.pieces) if piece.kind == _NORMAL
    }
    scores = [piece.score for piece in model.pieces]
    return models.BPE(
        vocab={piece.text: index for index, piece in enumerate(model.pieces)},
        merges=merges_from_scores(normal, scores),
        unk_token=_unknown(model).text,
        fuse_unk=True,
        byte_fallback=model.has_byte_fallback,
    )


def merges_from_scores(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores highest: every pair, best result first.

    Among equal ones it takes the leftmost. The longer left part comes first, because the rest of a
    run of equal characters lies at the end of the run.
    """
    cost = sum(len(token) ** 2 for token in vocab)
    if cost > _MAX_CUT_CHARACTERS:
        longest = max(map(len, vocab))
        raise ConversionRefused(
            f"the vocabulary has {len(vocab)} pieces of up to {longest} characters: to cut them "
            f"everywhere would copy {cost} characters, the limit is {_MAX_CUT_CHARACTERS}"
        )
    pairs = [
        (-scores[index], index, -cut, token[:cut], token[cut:])
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _unknown(model: SentencePieceModel) -> Piece:
    for piece in model.pieces:
        if piece.kind == _UNKNOWN:
            return piece
    raise ConversionRefused("tokenizer.model has no unknown piece")


def _add_tokens(tokenizer: Tokenizer, model: SentencePieceModel, settings: Settings) -> None:
    """Control pieces become special tokens; they and user-defined ones are found in a text."""
    wanted = {
        index: AddedToken(piece.text, normalized=False, special=piece.kind != _USER_DEFINED)
        for index, piece in enumerate(model.pieces)
        if piece.kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    }
    wanted |= settings.added or {}
    in_order = sorted(wanted.items())
    for _, token in in_order:
        if token.content in settings.specials:
            token.special = True
    tokenizer.add_tokens([token for _, token in in_order])  # one by one takes their square
    for token_id, token in in_order:
        if (found := tokenizer.token_to_id(token.content)) != token_id:
            raise ConversionRefused(
                f"added token {shown(token.content)} has id {token_id}, expected {found}: ids are "
                "not without gaps"
            )


def _frame(tokenizer: Tokenizer, settings: Settings) -> None:
    """Put bos before and eos after a text, where the settings say so."""
    before = [settings.bos] if settings.adds_bos else []
    after = [settings.eos] if settings.adds_eos else []
    if not before and not after:
        return
    used = [(token, tokenizer.token_to_id(token)) for token in (*before, *after)]
    for token, token_id in used:
        if token_id is None:
            raise ConversionRefused(f"{shown(token)} is to stand in every text and is no token")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
        + [f"{token}:1" for token in after],
        special_tokens=used,
    )

"""How models write tool calls: the table of forms.

A call is `before` name `after` arguments `foot`. Markers stand around the calls: `opener` before
the first, `between` two calls, `closer` after the last. A marker may be one token. The grammar then
names it by its id, because other tokens cannot spell it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kagami_router.tools.call_arguments import JSON, ArgumentStyle
from kagami_router.tools.gemma_arguments import GemmaStyle
from kagami_router.tools.python_arguments import PythonStyle
from kagami_router.tools.tagged_arguments import TaggedStyle


class Filling(NamedTuple):
    """What a model writes in the place of a placeholder."""

    read: str
    """A regex of what is read"""
    written: str
    """A term of what a grammar allows"""


# Placeholders of the texts below: the number of the call in its answer, and an id of the call.
FILLINGS: Mapping[str, Filling] = {
    "{n}": Filling(r"\d{1,6}", "/[0-9]{1,3}/"),
    "{id}": Filling(r"[A-Za-z0-9]{1,32}", "/[A-Za-z0-9]{9}/"),
}
PLACEHOLDER = re.compile(r"(\{n\}|\{id\})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """One way of writing calls, as texts."""

    name: str
    opener: str = ""
    """Begins the calls; "" = the calls are the whole answer and begin with `lead` and `before`."""
    lead: str = ""
    before: str
    after: str
    foot: str = ""
    closer: str = ""
    between: str = ""
    """Separates two calls; "" = at most one call."""
    signs: tuple[str, ...]
    """The chat template of a model that uses this form contains all of these …"""
    counter_signs: tuple[str, ...] = ()
    """… and none of these."""
    markers: tuple[str, ...] = ()
    """Parts of the texts above that may be one token."""
    style: ArgumentStyle = JSON
    prelude: str = ""
    """Without an opener: a marker that may stand before the calls; no text follows it."""
    text_begin: str = ""
    """Without an opener: a regex of what no text begins with, because calls do."""
    other_names: tuple[str, ...] = ()
    """What other servers call it."""

    @property
    def is_list(self) -> bool:
        """Whether several calls share one opener."""
        return bool(self.between) and (not self.opener or self.opener not in self.between)

    def call(self, name: str, arguments: str, number: int = 0) -> str:
        """One call as a model writes it; `arguments` are in the form's own style."""
        texts = {"{n}": str(number), "{id}": f"{number:09}"}
        head = PLACEHOLDER.sub(lambda found: texts[found[0]], f"{self.before}{name}{self.after}")
        return f"{head}{arguments}{self.foot}"

    def calls(self, calls: Iterable[str]) -> str:
        """All calls of an answer, each as `call` writes it."""
        return self.opener + self.lead + self.between.join(calls) + self.closer


_NAMED = '{"name": "'
_ARGUMENTS = '", "arguments": '
_PYTHON = PythonStyle()
# The first form that fits a template is used. The first of the table is for models without a form.
FORMS: tuple[ToolForm, ...] = (
    ToolForm(  # Hermes 2 Pro, Qwen 2.5 and 3, SmolLM3, Granite 4
        name="hermes",
        other_names=("qwen", "qwen25"),
        opener="<tool_call>",
        lead="\n",
        before=_NAMED,
        after=_ARGUMENTS,
        foot="}",
        closer="\n</tool_call>",
        between="\n</tool_call>\n<tool_call>\n",
        signs=("<tool_call>",),
        counter_signs=("<function=", "<arg_key>"),
        markers=("<tool_call>", "</tool_call>"),
    ),
    ToolForm(  # Qwen 3 Coder, Qwen 3.5, Nemotron 3
        name="qwen3_coder",
        other_names=("qwen3_xml",),
        opener="<tool_call>",
        lead="\n",
        before="<function=",
        after=">\n",
        foot="</function>",
        closer="\n</tool_call>",
        between="\n</tool_call>\n<tool_call>\n",
        signs=("<tool_call>", "<function="),
        markers=("<tool_call>", "</tool_call>"),
        style=TaggedStyle("<parameter=", ">\n", "\n</parameter>\n", "</function>"),
    ),
    ToolForm(  # GLM 4.5, 4.6, 4.7
        name="glm45",
        other_names=("glm", "glm47"),
        opener="<tool_call>",
        before="",
        after="\n",
        foot="</tool_call>",
        between="\n<tool_call>",
        signs=("<tool_call>", "<arg_key>"),
        markers=(
            "<tool_call>",
            "</tool_call>",
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
        ),
        style=TaggedStyle("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>"),
    ),
    ToolForm(
        name="minimax_m2",
        other_names=("minimax-m2",),
        opener="<minimax:tool_call>",
        lead="\n",
        before='<invoke name="',
        after='">\n',
        foot="</invoke>",
        closer="\n</minimax:tool_call>",
        between="\n",
        signs=("<minimax:tool_call>",),
        markers=("<minimax:tool_call>", "</minimax:tool_call>"),
        style=TaggedStyle('<parameter name="', '">', "</parameter>\n", "</invoke>"),
    ),
    ToolForm(
        name="seed_oss",
        opener="<seed:tool_call>",
        lead="\n",
        before="<function=",
        after=">\n",
        foot="</function>",
        closer="\n</seed:tool_call>",
        between="\n</seed:tool_call>\n<seed:tool_call>\n",
        signs=("<seed:tool_call>",),
        markers=("<seed:tool_call>", "</seed:tool_call>"),
        style=TaggedStyle("<parameter=", ">", "</parameter>\n", "</function>"),
    ),
    ToolForm(
        name="deepseek_v32",
        other_names=("deepseekv32",),
        opener="<｜DSML｜function_calls>",
        lead="\n",
        before='<｜DSML｜invoke name="',
        after='">\n',
        foot="</｜DSML｜invoke>",
        closer="\n</｜DSML｜function_calls>",
        between="\n",
        signs=("<｜DSML｜function_calls>",),
        markers=("｜DSML｜",),
        style=TaggedStyle(
            '<｜DSML｜parameter name="',
            '" string="{is_string}">',
            "</｜DSML｜parameter>\n",
            "</｜DSML｜invoke>",
        ),
    ),
    ToolForm(  # DeepSeek V3 and R1
        name="deepseek_v3",
        other_names=("deepseekv3",),
        opener="<｜tool▁calls▁begin｜>",
        lead="<｜tool▁call▁begin｜>",
        before="function<｜tool▁sep｜>",
        after="\n```json\n",
        foot="\n```",
        closer="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        between="<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>",
        signs=("<｜tool▁calls▁begin｜>", "```json"),
        markers=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
    ),
    ToolForm(
        name="deepseek_v31",
        other_names=("deepseekv31",),
        opener="<｜tool▁calls▁begin｜>",
        lead="<｜tool▁call▁begin｜>",
        before="",
        after="<｜tool▁sep｜>",
        closer="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        between="<｜tool▁call▁end｜><｜tool▁call▁begin｜>",
        signs=("<｜tool▁calls▁begin｜>",),
        counter_signs=("```json",),
        markers=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
    ),
    ToolForm(
        name="kimi_k2",
        opener="<|tool_calls_section_begin|>",
        lead="<|tool_call_begin|>",
        before="functions.",
        after=":{n}<|tool_call_argument_begin|>",
        closer="<|tool_call_end|><|tool_calls_section_end|>",
        between="<|tool_call_end|><|tool_call_begin|>",
        signs=("<|tool_calls_section_begin|>",),
        markers=(
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        ),
    ),
    ToolForm(  # Mistral Small 3.2: the model writes an id of its own
        name="mistral_call_id",
        opener="[TOOL_CALLS]",
        before="",
        after="[CALL_ID]{id}[ARGS]",
        between="[TOOL_CALLS]",
        signs=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ),
    ToolForm(  # Mistral's newer tokenizers: Magistral, Devstral, Ministral 3
        name="mistral_args",
        opener="[TOOL_CALLS]",
        before="",
        after="[ARGS]",
        between="[TOOL_CALLS]",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        markers=("[TOOL_CALLS]", "[ARGS]"),
    ),
    ToolForm(  # Mistral 7B v0.3, Nemo, Small
        name="mistral",
        opener="[TOOL_CALLS]",
        lead="[",
        before=_NAMED,
        after=_ARGUMENTS,
        foot="}",
        closer="]",
        between=", ",
        signs=("[TOOL_CALLS]",),
        markers=("[TOOL_CALLS]",),
    ),
    ToolForm(  # Phi-4 mini
        name="phi4_mini",
        other_names=("phi4_mini_json",),
        opener="<|tool_call|>",
        lead="[",
        before=_NAMED,
        after=_ARGUMENTS,
        foot="}",
        closer="]<|/tool_call|>",
        between=", ",
        signs=("<|tool|>", "<|/tool|>"),
        markers=("<|tool_call|>", "<|/tool_call|>"),
    ),
    ToolForm(  # Granite 3
        name="granite",
        opener="<|tool_call|>",
        lead="[",
        before=_NAMED,
        after=_ARGUMENTS,
        foot="}",
        closer="]",
        between=", ",
        signs=("<|tool_call|>",),
        markers=("<|tool_call|>",),
    ),
    ToolForm(  # Nemotron Nano 2
        name="nemotron",
        opener="<TOOLCALL>",
        lead="[",
        before=_NAMED,
        after=_ARGUMENTS,
        foot="}",
        closer="]</TOOLCALL>",
        between=", ",
        signs=("<TOOLCALL>",),
        markers=("<TOOLCALL>", "</TOOLCALL>"),
    ),
    ToolForm(  # Command R7B, Command A
        name="cohere",
        opener="<|START_ACTION|>",
        lead="[\n    ",
        before='{"tool_call_id": "{n}", "tool_name": "',
        after='", "parameters": ',
        foot="}",
        closer="\n]<|END_ACTION|>",
        between=",\n    ",
        signs=("<|START_ACTION|>",),
        markers=("<|START_ACTION|>", "<|END_ACTION|>"),
    ),
    ToolForm(  # Command R and R+
        name="command_r",
        opener="Action: ```json",
        lead="\n[\n    ",
        before='{\n        "tool_name": "',
        after='",\n        "parameters": ',
        foot="\n    }",
        closer="\n]```",
        between=",\n    ",
        signs=("Write 'Action:'", "tool_name"),
    ),
    ToolForm(  # Gemma 4
        name="gemma4",
        opener="<|tool_call>",
        before="call:",
        after="",
        foot="<tool_call|>",
        between="<|tool_call>",
        signs=("<|tool_call>", '<|"|>'),
        markers=("<|tool_call>", "<tool_call|>", '<|"|>'),
        style=GemmaStyle('<|"|>'),
    ),
    ToolForm(  # FunctionGemma
        name="functiongemma",
        opener="<start_function_call>",
        before="call:",
        after="",
        foot="<end_function_call>",
        between="<start_function_call>",
        signs=("<start_function_call>", "<escape>"),
        markers=("<start_function_call>", "<end_function_call>", "<escape>"),
        style=GemmaStyle("<escape>"),
    ),
    ToolForm(
        name="lfm2",
        opener="<|tool_call_start|>",
        lead="[",
        before="",
        after="(",
        foot=")",
        closer="]<|tool_call_end|>",
        between=", ",
        signs=("<|tool_call_start|>",),
        markers=("<|tool_call_start|>", "<|tool_call_end|>"),
        style=_PYTHON,
    ),
    ToolForm(
        name="olmo3",
        opener="<function_calls>",
        lead="\n",
        before="",
        after="(",
        foot=")",
        closer="\n</function_calls>",
        between="\n",
        signs=("<function_calls>",),
        markers=("<function_calls>", "</function_calls>"),
        style=_PYTHON,
    ),
    ToolForm(  # Llama 4; Llama 3.2 where its template asks for it
        name="pythonic",
        other_names=("llama4_pythonic",),
        lead="[",
        before="",
        after="(",
        foot=")",
        closer="]",
        between=", ",
        signs=("[func_name1(",),
        markers=("<|python_start|>", "<|python_end|>"),
        style=_PYTHON,
        prelude="<|python_start|>",
        text_begin=r"\s*\[\s*[\w.:\/-]{1,128}\(",
    ),
    ToolForm(  # Llama 3.1, 3.2, 3.3, which are trained to make one call at a time
        name="llama",
        other_names=("llama3", "llama3_json", "llama4_json"),
        before=_NAMED,
        after='", "parameters": ',
        foot="}",
        signs=('{"name": function name, "parameters"',),
        markers=("<|python_tag|>",),
        prelude="<|python_tag|>",
        text_begin=r"\s*\{\s*\"name\"\s*:",
    ),
)
DEFAULT = FORMS[0]

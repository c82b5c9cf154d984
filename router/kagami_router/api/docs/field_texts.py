"""What the OpenAPI document says of the fields of generating requests, by schema and field.

Beside the structs, not in them: they are read by the page under /docs, and by nobody else.
"""

from collections.abc import Mapping

_SAMPLED = {
    "temperature": "Divides the logits before sampling.",
    "top_k": "Sample among this many tokens, the likeliest.",
    "top_p": "Sample among the likeliest tokens that together have this probability.",
    "min_p": "Sample among the tokens with at least this share of the likeliest one's probability.",
    "repetition_penalty": "Above 1.0, tokens of the prompt and the answer become less likely.",
    "frequency_penalty": "Taken from a token's logit for each time it is in the answer.",
    "seed": "The same seed gives the same answer; up to 2^64-1. None: a random one.",
    "ignore_eos": "Go on past the model's own end, up to the limit of tokens.",
}
_INPUTS = {
    "inputs": "The prompt, as it stands.",
    "parameters": "How to generate. Without this object the answer is sampled; with an empty one"
    " it is greedy.",
}
_OPENAI = {
    **_SAMPLED,
    "temperature": "Divides the logits before sampling; 0 is greedy, 1 the default.",
    "top_p": f"{_SAMPLED['top_p']} 1 is off, 0 is greedy.",
    "top_k": f"{_SAMPLED['top_k']} Below 1 is off.",
    "seed": "The same seed gives the same answer; -2^63 to 2^64-1. None: a random one.",
    "presence_penalty": "Taken from the logit of a token that is in the answer, once.",
    "model": "Echoed in the answer; `tgi` or none stands for the model that is served.",
    "max_tokens": "Tokens of the answer at most; none: the rest of the context.",
    "max_completion_tokens": "The newer name of `max_tokens`; it wins.",
    "stop": "One text or several: the answer ends before them.",
    "stream": "Answer with events, one for each token.",
    "stream_options": "What a stream has beside its tokens.",
    "n": "Answers to each prompt; --max-best-of is the limit.",
    "stop_token_ids": "Tokens that end the answer as the model's own end does.",
    "include_stop_str_in_output": "True: the stop string stays in the text.",
    "response_format": "What the answer has to follow.",
    "guided_json": "vLLM's older name of a schema that the answer follows.",
    "guided_regex": "vLLM's older name of a regular expression that the answer follows.",
    "guided_choice": "vLLM's older name of the texts of which the answer is one.",
    "guided_grammar": "vLLM's older name of a Lark grammar that the answer follows.",
    "structured_outputs": "vLLM's object of `json`, `regex`, `choice`, `grammar` or `json_object`.",
    "regex": "SGLang's name of a regular expression that the answer follows.",
    "ebnf": "SGLang's name of a grammar that the answer follows; in Lark's notation.",
    "json_schema": "SGLang's name of a schema that the answer follows.",
    "logit_bias": "By token id, what is added to its logit: -100 to 100. TGI's list is ignored.",
}

FIELD_TEXTS: Mapping[str, Mapping[str, str]] = {
    "GenerateRequest": _INPUTS,
    "CompatGenerateRequest": {**_INPUTS, "stream": "Answer with events, one for each token."},
    "GenerateParameters": {
        **_SAMPLED,
        "best_of": "Generate this many answers and give the one with the best mean logprob.",
        "typical_p": "Sample among the most typical tokens that together have this probability.",
        "do_sample": "Sample; any of `temperature` other than 1, `top_k`, `top_p`, `typical_p`"
        " and `min_p` does so too.",
        "max_new_tokens": "Tokens of the answer at most; none: the rest of the context.",
        "return_full_text": "Put the prompt in front of the text. None: only on `/`.",
        "stop": "The answer ends behind the first of these texts, which stays in it;"
        " --max-stop-sequences is the limit.",
        "truncate": "Keep only this many tokens of the prompt, the last ones.",
        "watermark": "Mark the text by the tokens that are preferred.",
        "details": "Tell tokens, logprobs, seed and the reason of the end.",
        "decoder_input_details": "Tell the prompt's tokens and logprobs, and `details`; not in"
        " streams.",
        "top_n_tokens": "With each token tell this many of the likeliest; --max-top-n-tokens is"
        " the limit.",
        "grammar": "What the answer has to follow.",
        "adapter_id": "Refused: no adapters are served yet.",
    },
    "GrammarType": {
        "type": "`json` or `json_object`: a JSON schema; `json_schema`: an object that"
        " has it as its `schema`; `regex`: a regular expression.",
        "value": "The schema, as an object or its text, or the regular expression.",
    },
    "StreamOptions": {"include_usage": "One more chunk in the end, with the tokens spent."},
    "ResponseFormat": {
        "type": "`json_object` without a schema is any object.",
        "json_schema": "OpenAI's place for the schema.",
        "value": "TGI's place for a schema or a regular expression.",
        "schema": "The schema of a `json_object`.",
    },
    "ChatRequest": {
        **_OPENAI,
        "messages": "The conversation; the chat template makes the prompt of it.",
        "logprobs": "Tell the logprob of each token.",
        "top_logprobs": "With each token tell this many of the likeliest; needs `logprobs`.",
        "tools": "Functions that the model may call.",
        "tool_choice": "`auto`, `none`, `required`, or the one function to call.",
        "tool_prompt": "What the model is told about its tools, in place of our own words.",
        "parallel_tool_calls": "False: one call at most.",
        "response_format": "What the answer has to follow; with `tools`, one that is no call.",
        "documents": "For templates that show documents.",
        "add_generation_prompt": "Whether the template opens the assistant's turn.",
        "continue_final_message": "Whether the last message is continued. None: if it is the"
        " assistant's.",
        "chat_template": "The name of one of the model's own templates.",
        "chat_template_kwargs": "More variables for the template.",
        "reasoning_effort": "For templates that read it. It switches reasoning on; `none`: off.",
        "reasoning": "The same in OpenRouter's form; `exclude`: the answer does not show it.",
        "thinking": "Whether the model thinks first: a truth value, or an object with `type`.",
        "enable_thinking": "Whether the model thinks first.",
        "include_reasoning": "False: the answer does not show what the model thinks.",
    },
    "CompletionRequest": {
        **_OPENAI,
        "prompt": "A text or token ids, or several of them.",
        "suffix": "Refused.",
        "echo": "Put the prompt in front of the text; with `max_tokens` 0 only score it.",
        "best_of": "Generate this many answers and give the `n` with the best mean logprob.",
        "logprobs": "Tell the logprob of each token, and this many of the likeliest.",
    },
}

"""The recorded answers with their requests."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("data")

# Answers of LoRA adapters: they wait for adapters to be served.
WAITING_FOR_LORA = frozenset(
    {
        "3.3/test_lora_mistral/test_lora_mistral_with_customer_support_adapter",
        "3.3/test_lora_mistral/test_lora_mistral_with_dbpedia_adapter",
        "3.3/test_lora_mistral/test_lora_mistral_without_adapter",
        "3.3/test_lora_mistral/test_lora_mistral_without_customer_support_adapter",
    }
)


@dataclass(frozen=True)
class Case:
    """One recorded file."""

    name: str
    """`3.3/test_chat_llama/test_flash_llama_simple`"""
    recorded: Any
    path: str
    body: dict[str, Any]
    copies: int

    @property
    def version(self) -> str:
        return self.name.partition("/")[0]

    @property
    def is_native(self) -> bool:
        return not self.path.startswith("/v1/")

    @property
    def is_chat(self) -> bool:
        return self.path == "/v1/chat/completions"

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def parameters(self) -> dict[str, Any]:
        return self.body.get("parameters", {}) if self.is_native else self.body


def recorded(name: str) -> Any:
    """What the file says."""
    return json.loads((DATA / f"{name}.json").read_text())


def all_cases() -> list[Case]:
    """Every recorded file, those of LoRA aside."""
    requests = json.loads((DATA / "requests.json").read_text())
    files = sorted(file for file in DATA.rglob("*.json") if file.parent != DATA)
    names = [str(file.relative_to(DATA).with_suffix("")) for file in files]
    return [
        _case(name, requests[name.partition("/")[2]])
        for name in names
        if name not in WAITING_FOR_LORA
    ]


def _case(name: str, request: dict[str, Any]) -> Case:
    return Case(name, recorded(name), request["path"], request["body"], request.get("copies", 1))

"""Conversions to safetensors and tokenizer.json: `python -m kagami_launcher.convert`."""

"""The hub's files into the hub cache: `python -m kagami_launcher.download MODEL_ID`.

A process of its own, because `huggingface_hub` takes long to import and a download has to end at
once when the launcher is told to stop. `text-generation-server download-weights` is the same.
"""

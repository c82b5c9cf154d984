"""The models: one decoder with a spec per family, and transformers' own for the rest."""

"""The reference backend: plain torch, on any device."""

"""The native engine: writes a merged image itself, by sharing or copying what must come in."""

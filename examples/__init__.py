"""Examples; run them from the repository root."""

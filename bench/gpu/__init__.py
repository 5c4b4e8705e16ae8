"""The stages of tools/gpu_check: each runs as a process of its own and writes one JSON document."""

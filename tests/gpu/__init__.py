"""What only a GPU can show: `make gpu` (docs/gpu.md). The ordinary run does the same tests in small on the CPU."""

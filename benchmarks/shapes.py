"""Real shapes (tokens, hidden, vocabulary) by name."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"{self.N}x{self.H}x{self.V}"


CPU = {
    "gpt2-like": Shape(1024, 512, 50257),
    "qwen-like": Shape(1024, 1024, 151936),
    "small-hidden": Shape(2048, 256, 32768),
}
CUDA = {
    "llama-1b": Shape(8192, 2048, 128256),
    "llama-8b": Shape(8192, 4096, 128256),
    "qwen3-8b": Shape(8192, 4096, 151936),
}

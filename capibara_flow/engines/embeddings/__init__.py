"""Models that turn texts into vectors: one product a file, all behind ``ports.Embedder``."""

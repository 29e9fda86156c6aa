"""Measures Salver through gRPC, beside `transformers.generate`. See docs/benchmarks.md."""

"""The engine: requests become steps, in a worker process of its own."""

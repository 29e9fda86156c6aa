"""The server: engine (scheduling, worker process), rpc (the gRPC front), configuration, metrics."""

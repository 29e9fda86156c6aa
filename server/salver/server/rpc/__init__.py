"""The gRPC front: validation, admission, conversion, status codes."""

"""The coordinator: rounds over gRPC with mutual TLS. It never imports torch, and never the client."""

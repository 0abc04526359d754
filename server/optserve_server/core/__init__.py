"""The domain: sessions and their steps.

Knows torch and the standard library; nothing of gRPC, protobuf or Prometheus.
"""

"""The gRPC server: a translation between the service and its protocol."""

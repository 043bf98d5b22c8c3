"""The service over gRPC: messages, status codes, and the server."""

from sparsevila_cluster.gateway.grpc.grpc_server import GrpcServer as GrpcServer

"""Generated from protos/sparsevila/v1/video_qa.proto by `make protos`."""

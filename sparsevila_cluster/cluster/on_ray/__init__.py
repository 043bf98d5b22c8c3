"""The skin of Ray around workers, registry and routers."""

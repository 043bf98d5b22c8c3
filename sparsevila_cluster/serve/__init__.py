"""The application that Ray Serve runs, and how a cluster is started on this machine."""

"""The mount side: a guest's disk as a file in a FUSE mount that knows what changed."""

"""The commands of ``replicator``, one module each, which defines ``command``."""

"""What a receiver's process may use, so that one session never waits for what others hold."""

import resource

import trio

from replicator.admission import CONNECTIONS_MAX

# The worker, the apply of the pass before, a checkpoint, the proof of the disk, and the look for
# who else wants the replica; and one to spare.
THREADS_A_SESSION_MAX = 6


def raise_limits() -> None:
    """Allow as many threads and descriptors as the connections need that are let in.

    Invariant: sessions whose disk hangs, each with all its threads in it, leave threads to the
    others. Threads are made as they are needed, so the bound costs nothing.
    """
    trio.to_thread.current_default_thread_limiter().total_tokens = (
        CONNECTIONS_MAX * THREADS_A_SESSION_MAX
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

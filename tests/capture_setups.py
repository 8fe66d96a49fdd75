"""Who takes part in the captures of the model, and what is left out of it to see that found."""

from capture_memory import Setup, Write
from capture_model import Model
from interleaving import Explorer

HALF_EACH: tuple[Write, ...] = (("a", 0, 0), ("b", 1, 1))

SETUPS = {
    "one writer": Setup((("a", 0, 1),)),
    "one who makes a hole": Setup((("zero", 0, 1),)),
    "no room in the spill": Setup((("a", 0, 0),), records=0),
    "the server dies twice": Setup((("a", 0, 0),), server_deaths=2),
    "another sender": Setup((("a", 0, 1),), other=True),
    "two passes": Setup((("a", 0, 1),), passes=(2,)),
    "two writers of a chunk": Setup(HALF_EACH),
    "two disks": Setup((("a", 0, 0), ("b", 2, 2)), disks=((0,), (1,))),
    "a dead sender": Setup((("a", 0, 1),), passes=(1, 1), sender_deaths=1, janitor=True),
}
LONG_SETUPS = {
    "one over the other": Setup((("a", 0, 1), ("b", 1, 1))),
    "a hole and a writer": Setup((("zero", 0, 1), ("b", 1, 1))),
    "one across two chunks": Setup((("a", 0, 1), ("b", 1, 2)), disks=((0, 1),)),
    "one across two disks": Setup((("a", 0, 0), ("b", 1, 2)), disks=((0,), (1,))),
    "room for one of two": Setup((("a", 0, 0), ("b", 2, 2)), disks=((0, 1),), records=1),
    "two writers in two passes": Setup(HALF_EACH, passes=(2,)),
    "two writers and another sender": Setup((("a", 0, 0), ("b", 0, 0)), other=True),
    "two writers, and the server dies": Setup(HALF_EACH, server_deaths=1),
    "server and sender die": Setup((("a", 0, 0),), passes=(1, 1), server_deaths=1, sender_deaths=1),
    "two writers and a dead sender": Setup(HALF_EACH, passes=(1, 1), sender_deaths=1),
    "only one chunk is captured": Setup(
        (("a", 0, 0), ("b", 1, 2)), disks=((0, 1),), old=(1,), passes=(2,)
    ),
}

# Each with the setup in which it is found.
MUTATIONS = {
    "a writer does not look at the word again": "one writer",
    "marks come after the data": "one writer",
    "nobody waits until it is closed": "one writer",
    "no lock on the chunk": "two writers of a chunk",
    "no second look at the mark": "two writers of a chunk",
    "marked before the copy": "one writer",
    "not marked inside the lock": "two writers of a chunk",
    "a state has no epoch": "two writers in two passes",
    "a copy that was cut short counts": "the server dies twice",
    "a full spill is not given up": "no room in the spill",
    "nobody asks whether the capture is intact": "no room in the spill",
    "the epoch advances before the bit is set": "one writer",
    "another sender's epoch is taken for ours": "two writers and another sender",
    "the sender does not wait for the writers": "one writer",
    "a newer chunk is no part of the capture": "one writer",
    "a record that is not there yet is not looked for again": "two disks",
    "the marks are not looked at after the holes": "one who makes a hole",
    "the marks are looked at before the data": "one writer",
    "the marks are not looked at after the data": "one writer",
    "the cursor moves before the data is read": "two writers of a chunk",
    "a writer waits until the sender has read": "one writer",
}


def explore(setup: Setup, mutation: str = "") -> tuple[int, set[str]]:
    """The number of states, and what was seen in them. Raises Violation."""
    assert mutation in ("", *MUTATIONS)
    model = Model(setup, mutation)
    threads = model.threads()
    explorer = Explorer(
        threads,
        model.layout.memory,
        lambda memory, places: model.faults(threads, memory, places),
        model.invariant,
    )
    return explorer.explore(range(len(setup.writes))), model.seen

"""Captures in a model: all interleavings, and mutations that must be found."""

import os

import pytest
from capture_setups import LONG_SETUPS, MUTATIONS, SETUPS, explore
from interleaving import Violation

# Another number means that the model is another one. What was seen shows that there was something
# to prove: copies that were believed, and captures that were given up.
COPIES, LIVE, GIVEN_UP = "believed with copies", "believed", "given up"
SEEN = {
    "one writer": (1926, {COPIES, LIVE}),
    "one who makes a hole": (2019, {COPIES, LIVE}),
    "no room in the spill": (1638, {GIVEN_UP, LIVE}),
    "the server dies twice": (67013, {COPIES, LIVE}),
    "another sender": (12627, {COPIES, LIVE}),
    "two passes": (4186, {COPIES, LIVE}),
    "two writers of a chunk": (123395, {COPIES, LIVE}),
    "two disks": (229754, {COPIES, LIVE}),
    "a dead sender": (127380, {COPIES, LIVE}),
}


@pytest.mark.parametrize("name", SETUPS)
def test_every_believed_capture_is_one_instant(name: str) -> None:
    assert explore(SETUPS[name]) == SEEN[name]


@pytest.mark.soak
@pytest.mark.skipif("FUSEDISK_LONG_MODELS" not in os.environ, reason="scripts/soak explores them")
@pytest.mark.parametrize("name", LONG_SETUPS)
def test_every_believed_capture_is_one_instant_in_larger_models(name: str) -> None:
    states, seen = explore(LONG_SETUPS[name])
    assert COPIES in seen
    print(f"{name}: {states} states")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_leaving_out_any_one_precaution_is_found(mutation: str) -> None:
    setup = MUTATIONS[mutation]
    with pytest.raises(Violation):
        explore((SETUPS | LONG_SETUPS)[setup], mutation)

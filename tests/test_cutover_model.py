"""The switch of a cutover in a model: all interleavings, and mutations that must be found."""

import pytest
from cutover_model import MUTATIONS, Violation, explore

# As the model's description says; another number means that the model is another one.
STATES = 15133


def test_no_order_of_steps_losses_and_crashes_breaks_an_invariant() -> None:
    assert explore() == STATES


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_leaving_out_any_one_precaution_is_found(mutation: str) -> None:
    with pytest.raises(Violation):
        explore(mutation)

"""A fixed number of inputs of the fuzzer; `scripts/fuzz` runs more."""

import pytest
from wire_fuzzing import check_input

ROUNDS, INPUTS = 8, 500


@pytest.mark.parametrize("part", range(ROUNDS))
def test_damaged_conversations(part: int) -> None:
    for seed in range(part * INPUTS, (part + 1) * INPUTS):
        check_input(seed)

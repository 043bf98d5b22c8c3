"""A short run of the fuzzer of the door; `make fuzz-door` is the long one."""

import asyncio

from tests.gateway.door_mutants import Known, case_of
from tests.gateway.fuzz_door import fuzz


def test_broken_calls_and_frames_end_as_typed_errors_and_leave_nothing(checkpoint):
    outcomes, line = asyncio.run(asyncio.wait_for(fuzz(range(300), 7, checkpoint), 100))
    assert not outcomes.violations, outcomes.violations
    assert outcomes.counts["OK"] > 30 and outcomes.counts["INVALID_ARGUMENT"] > 50 and "300 cases, seed 7" in line


def test_a_number_names_a_case():
    known = Known("0" * 64, b"clip")
    for number in range(50):
        one, again = case_of(3, number, known), case_of(3, number, known)
        assert one == again and (one.frames or one.path)
    assert len({case_of(3, number, known).label for number in range(50)}) > 30

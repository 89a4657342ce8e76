"""A short version of each row of the fault campaign, and the page that holds its results."""

import pytest

from tests.campaign import program
from tests.campaign.trials import ROWS

FAST = [name for name, row in ROWS.items() if row.short]


@pytest.mark.parametrize("name", FAST)
def test_the_first_faults_of_each_row_are_survived(name):
    row = ROWS[name]
    found = program.try_row(row, range(row.short), seed=0, loud=False)
    if "left out" in found:
        pytest.skip(found["left out"])
    assert found["failures"] == []
    assert found["tried"] == row.short

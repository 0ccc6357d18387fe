"""What every policy must do, over the baselines and all policies of the catalogue that work."""

import pytest

from holdfast.context.cache.conformance import INVARIANTS
from holdfast.context.cache.policies import find, untrained

DROPPING = [name for name, cls in untrained().items() if cls.drops]


@pytest.mark.parametrize("invariant", INVARIANTS)
@pytest.mark.parametrize("name", DROPPING)
def test_policy(name, invariant):
    INVARIANTS[invariant](lambda: find(name))

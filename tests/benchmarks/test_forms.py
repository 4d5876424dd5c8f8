"""Forms that measurements compare compute the same."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import activation_forms, kv_forms


@pytest.mark.parametrize("name", kv_forms.FORMS)
def test_forms_of_cache_and_attention_agree(name: str) -> None:
    first = next(iter(kv_forms.FORMS.values()))
    np.testing.assert_allclose(kv_forms.FORMS[name].run(1, 40)(), first.run(1, 40)(), atol=1e-5)


@pytest.mark.parametrize("name", activation_forms.FORMS)
def test_forms_of_the_activation_agree(name: str) -> None:
    first = next(iter(activation_forms.FORMS.values()))
    np.testing.assert_allclose(activation_forms.FORMS[name].run(5, 30)(), first.run(5, 30)(), atol=1e-4)

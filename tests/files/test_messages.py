# SPDX-License-Identifier: Apache-2.0
import doctest

from hypothesis import given
from hypothesis import strategies as st

from vpt_jax.files import messages


@given(st.text() | st.integers() | st.floats() | st.lists(st.text()))
def test_any_value_is_one_short_line_of_ascii(value):
    text = messages.shown(value)
    assert text.isascii() and text.isprintable() and len(text) <= messages.LONGEST + 3
    assert len(messages.shown(value, 5)) <= 8
    assert messages.shown(10**5000) == "a number of thousands of digits"


@given(st.text())
def test_text_and_errors_are_one_line(text):
    assert messages.printable(text).isprintable()
    assert messages.printable("é ok") == messages.reason(ValueError("é ok")) == "é ok"
    said = messages.reason(OSError(text))
    assert said.isprintable() and 0 < len(said) <= messages.LONGEST + 3


def test_the_example_of_the_three_parts():
    assert doctest.testmod(messages).attempted > 0
    assert doctest.testmod(messages).failed == 0

import types

import pytest

from tritium.errors import (
    InputError,
    check_positive,
    describe_os_error,
    names_file,
    plural,
    unknown_name,
)

pytestmark = pytest.mark.plain

RECIPES = ("laptop", "gpt2", "gpt2-xl")


def test_an_unknown_name_suggests_the_nearest():
    assert (
        unknown_name("recipe", "lapto", RECIPES) == "unknown recipe 'lapto'; did you mean 'laptop'?"
    )
    two = "unknown recipe 'gtp2'; did you mean 'gpt2'"
    assert unknown_name("recipe", "gtp2", RECIPES).startswith(two)


def test_a_name_like_no_other_lists_all():
    expected = "unknown recipe 'x'; expected one of laptop, gpt2, gpt2-xl"
    assert unknown_name("recipe", "x", RECIPES) == expected


def test_an_option_below_one_raises():
    options = types.SimpleNamespace(steps=1, rounds=None, batch_size=0)
    check_positive(options, "steps", "rounds")
    with pytest.raises(InputError, match="batch_size: expected 1 or more, got 0"):
        check_positive(options, "steps", "batch_size")


def test_one_has_no_plural():
    assert plural(1, "step") == "1 step"
    assert plural(2000, "step") == "2,000 steps"
    assert plural(0.999, "epoch", ".2g") == "1 epoch"


def test_a_file_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match="missing") as caught:
        (tmp_path / "missing").read_bytes()
    assert describe_os_error(caught.value) == f"{tmp_path / 'missing'}: No such file or directory"
    assert describe_os_error(OSError(28, "No space left on device")) == "No space left on device"


def test_an_error_of_a_write_gets_the_name_of_its_file():
    with pytest.raises(OSError, match="No space left") as caught, names_file("a.json"):
        raise OSError(28, "No space left on device")
    assert describe_os_error(caught.value) == "a.json: No space left on device"

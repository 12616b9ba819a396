import pytest

from tritium.errors import InputError
from tritium.train.eval.windows import check_sizes, exact_windows, huggingface_windows

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 37])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_exact_windows_predict_every_token_once_with_enough_context(length, stride):
    targets = []
    for window in exact_windows(length, 8, stride):
        assert 0 < window.end - window.begin <= 8
        assert window.weight == window.num_targets
        for place in range(window.first, window.end):
            context = place - window.begin + 1
            assert context == place + 1 or context > 8 - stride
            targets.append(place + 1)
    assert targets == list(range(1, length))


def test_huggingface_windows_weigh_new_tokens_minus_one():
    windows = list(huggingface_windows(20, 8, 4))
    assert [(w.begin, w.end, w.first, w.weight) for w in windows] == [
        (0, 7, 0, 7),  # tokens 0 ... 7: the first is not a target
        (4, 11, 7, 3),
        (8, 15, 11, 3),
        (12, 19, 15, 3),
    ]
    # Without overlap the first token of each window is never a target.
    windows = list(huggingface_windows(17, 8, 8))
    assert [(w.begin, w.end, w.first, w.weight) for w in windows] == [(0, 7, 0, 7), (8, 15, 8, 7)]


def test_sizes_out_of_range_raise():
    for context, stride in ((0, 1), (9, 1)):
        with pytest.raises(InputError, match="context_tokens: expected 1 to 8"):
            check_sizes(context, stride, 8)
    for stride in (0, 7):
        with pytest.raises(InputError, match="stride: expected 1 to 6"):
            check_sizes(6, stride, 8)

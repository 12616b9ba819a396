import pytest

from tritium.bench.training.python_text import is_broken

pytestmark = pytest.mark.plain


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.name\nprint(x)\n)",  # only three lines count
        "    def f(self):\n        return 1\n\n    def g(self",
        "        return x\n    def f(self):\n",
        '    def f(self, x):\n        """A text that goes on\n        (here',
        "\tif x:\n\t\ty = 1\n",
    ],
)
def test_starts_of_python_are_not_broken(text):
    assert not is_broken(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n  \n",
        "x = = 1",
        "    def f(x, x):\n        pass\n    y = 1",
        "if x:\ny = 1\n",
        "a)\n",
    ],
)
def test_broken_lines_are_found(text):
    assert is_broken(text)

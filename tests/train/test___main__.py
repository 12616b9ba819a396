import subprocess
import sys

import pytest

pytestmark = pytest.mark.plain


def test_python_m_tritium_train_is_tritium_train(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tritium.train", "no-such-recipe"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tritium: unknown recipe 'no-such-recipe'")

import resource

import pytest
import torch
from safetensors.torch import load_file

from tritium.model.safetensors_file import DTYPES, write_safetensors

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_the_same_bits(dtype, tmp_path):
    x = torch.randn(6, 5).to(dtype)
    tensors = {"b": x, "a": x.t(), "strided": x[::2, 1:3], "vector": x[0], "empty": x[:0]}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    header_bytes = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0  # the tensors of the mapped file are aligned
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value), name


def test_a_full_disk_names_the_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "x.safetensors")

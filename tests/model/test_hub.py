import huggingface_hub
import pytest
import torch

from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.model.hub import download, is_hub_name

pytestmark = pytest.mark.plain


def test_an_existing_path_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("openai-community/gpt2")
    assert not any(map(is_hub_name, ("gpt2", "./owner/name", "/owner/name", "a/b/c", "")))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_name("owner/name")


def test_a_hub_name_is_downloaded_with_its_revision(tmp_path, monkeypatch):
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=50, context_tokens=8))
    model.save_pretrained(tmp_path / "0123abc")
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns[-1]))
        return str(tmp_path / "0123abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = GPT.from_pretrained("owner/name", revision="v1")
    assert torch.equal(found.wpe.weight, model.wpe.weight)
    assert calls == [("owner/name", "v1", "*.safetensors")]


def test_no_network_is_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("Got: ConnectError\nAn error happened")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"owner/name: .* got OSError: Got: ConnectError$"):
        download("owner/name")

"""A classifier on the last token: its loss, padding, frozen weights, and transformers' models."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.held import Held
from tests.model.models import LLAMA, SMALL, random_model
from tritium.errors import InputError
from tritium.model import GPT, GPTClassifier

LABELS = ("ham", "spam", "other")


def classifier(config=SMALL, labels=LABELS) -> GPTClassifier:
    torch.manual_seed(1)
    model = GPTClassifier.from_gpt(random_model(config), labels)
    with torch.no_grad():
        model.score.weight.normal_()
    return model


def places(last: torch.Tensor, length: int) -> torch.Tensor:
    """The places of the last tokens in flattened rows."""
    return torch.arange(len(last)) * length + last


def batch(rows=4, length=12, vocab_size=SMALL.vocab_size) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocab_size, (rows, length), generator=generator)
    last = torch.randint(length, (rows,), generator=generator)
    last[0] = length - 1
    return tokens, last


@pytest.mark.parametrize("config", [SMALL, LLAMA, replace(SMALL, tied_head=False)])
def test_logits_read_the_last_hidden_state(config):
    model = classifier(config)
    tokens, last = batch()
    y, _ = model.hidden(tokens)
    expected = y.view(4, 12, -1)[range(4), last.tolist()] @ model.score.weight.t()
    torch.testing.assert_close(model(tokens, places(last, 12)), expected)


def test_loss_is_the_mean_of_weighted_cross_entropies():
    model = classifier()
    tokens, last = batch()
    last = places(last, 12)
    label = torch.tensor([0, 2, 1, 2])
    losses = F.cross_entropy(model(tokens, last), label, reduction="none")
    torch.testing.assert_close(model(tokens, last, label), losses.mean())
    weight = torch.tensor([0.5, 2.0, 1.0, 2.0])
    loss = model(tokens, last, label, loss_weight=weight)
    torch.testing.assert_close(loss, (losses * weight).mean())


@pytest.mark.parametrize("config", [SMALL, LLAMA])
def test_added_padding_does_not_change_predictions(config):
    model = classifier(config).eval()
    tokens, last = batch()
    longer = torch.cat((tokens, torch.full((4, 11), 7)), dim=1)
    found = model(longer, places(last, 23)).softmax(1)
    assert (found - model(tokens, places(last, 12)).softmax(1)).abs().max() < 1e-6


def test_packed_texts_have_the_logits_of_padded_rows():
    model = classifier()
    tokens, last = batch()
    ends = (last + 1).cumsum(0)
    packed = torch.cat([row[: end + 1] for row, end in zip(tokens, last.tolist(), strict=True)])
    packed = F.pad(packed, (0, -len(packed) % 2)).view(2, -1)  # a text can span two rows
    cu_seqlens = torch.tensor([0, *ends.tolist(), packed.numel()], dtype=torch.int32)
    found = model(packed, ends - 1, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(found, model(tokens, places(last, 12)))


@pytest.mark.parametrize("trained_blocks", [0, 1, 2, None])
def test_only_the_chosen_weights_are_trained(trained_blocks):
    model = classifier()
    model.freeze(trained_blocks)
    tokens, last = batch()
    model(tokens, places(last, 12), torch.tensor([0, 2, 1, 2])).backward()
    with_gradient = {name for name, each in model.named_parameters() if each.grad is not None}
    names = {name for name, _ in model.named_parameters()}
    head = ("score", "ln_f")
    starts = {0: ("score",), 1: (*head, "h.1."), 2: (*head, "h."), None: ("",)}[trained_blocks]
    assert with_gradient == {name for name in names if name.startswith(starts)}


def test_freezing_more_blocks_than_there_are_raises():
    with pytest.raises(ValueError, match="trained_blocks: expected 0 to 2, the blocks of the"):
        classifier().freeze(3)


def test_one_label_raises():
    with pytest.raises(ValueError, match="expected two labels or more, got 1"):
        GPTClassifier(SMALL, ["ham"])


def test_weights_of_a_gpt_are_kept():
    gpt = random_model(replace(SMALL, tied_head=False))
    model = GPTClassifier.from_gpt(gpt, LABELS)
    weights = gpt.state_dict() | {"score.weight": model.score.weight}
    del weights["lm_head.weight"]
    found = model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_classifier_has_the_mode_of_its_gpt(is_training):
    gpt = random_model(SMALL).train(is_training)
    assert GPTClassifier.from_gpt(gpt, LABELS).training == is_training


def test_activation_checkpointing_keeps_fewer_bytes():
    tokens, last = batch()
    kept = {}
    for mode in ("none", "block"):
        model = GPTClassifier(SMALL, LABELS, recompute=mode)
        with Held(tokens, *model.parameters()) as held:
            model(tokens, places(last, 12), torch.tensor([0, 2, 1, 2]))
        kept[mode] = held.most
    assert kept["block"] < 0.8 * kept["none"]


# --- folders of transformers


@pytest.mark.parametrize("config", [SMALL, LLAMA])
def test_transformers_gives_the_same_logits(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = classifier(config).eval()
    model.save_pretrained(tmp_path / "out", end_of_text=89)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    family = "GPT2" if config is SMALL else "Llama"
    assert type(other).__name__ == f"{family}ForSequenceClassification"
    assert other.config.id2label == dict(enumerate(LABELS))

    tokens, last = batch(vocab_size=89)
    for row, end in enumerate(last.tolist()):
        tokens[row, end + 1 :] = 89  # transformers finds the last token by the padding
    with torch.no_grad():
        found = other(tokens).logits
    assert (found - model(tokens, places(last, 12))).abs().max() < 1e-5


def test_a_saved_classifier_is_read_back_with_the_same_bits(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "out", end_of_text=89)
    found = GPTClassifier.from_pretrained(tmp_path / "out")
    assert found.labels == LABELS
    assert not found.training
    for name, value in model.state_dict().items():
        rows = SMALL.vocab_size if name == "wte.weight" else None  # the others are padding
        assert torch.equal(found.state_dict()[name][:rows], value[:rows]), name


def test_a_language_model_is_not_read_as_a_classifier(tmp_path):
    random_model().save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="expected a model that classifies texts, got a language"):
        GPTClassifier.from_pretrained(tmp_path / "out")


def test_a_classifier_is_not_read_as_a_language_model(tmp_path):
    classifier().save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match=r"expected only tensors of the model, got score\.weight"):
        GPT.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"id2label": {"a": "ham", "b": "spam"}}, "id2label: expected a name for each number"),
        ({"architectures": True}, "architectures: expected a list of names, got True"),
        ({"architectures": "GPT2LMHeadModel"}, "expected a list of names, got 'GPT2LMHeadModel'"),
    ],
)
def test_wrong_fields_of_a_classifier_raise(changed, message, tmp_path):
    classifier().save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(InputError, match=message):
        GPTClassifier.from_pretrained(tmp_path / "out")

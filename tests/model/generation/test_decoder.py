"""The static buffers of a step, and on CUDA its graph."""

import pytest
import torch

from tests.model.models import LLAMA, SMALL, random_model
from tritium.model.generation import Decoder, Sampling
from tritium.model.generation.sampling import draw_numbers

pytestmark = pytest.mark.plain

SAMPLING = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
PROMPTS = [[1, 2, 3, 4], [5], [6, 7]]


def buffers(decoder: Decoder) -> list[torch.Tensor]:
    cache = decoder.cache
    return [
        *(decoder.tokens, decoder.draws, decoder._seen),
        *(cache.keys, cache.values, cache.lengths, cache.is_active),
    ]


def begin(decoder: Decoder) -> None:
    decoder.prefill([0, 1, 2], PROMPTS)
    decoder.see([0, 1, 2], PROMPTS)


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_steps_write_to_the_same_tensors(config):
    """The step that CUDA captures. Here it runs without a graph."""
    decoder = Decoder(random_model(config), 3, SAMPLING)
    begin(decoder)
    addresses = [buffer.data_ptr() for buffer in buffers(decoder)]
    draws = draw_numbers([1, 2, 3], 8)
    first = [decoder.step(numbers) for numbers in draws]
    decoder.cache.finish([1])
    begin(decoder)
    assert [decoder.step(numbers) for numbers in draws] == first
    assert [buffer.data_ptr() for buffer in buffers(decoder)] == addresses


def test_a_decoder_is_reused_by_calls_that_differ_in_seed_and_stops():
    model = random_model()
    decoder = Decoder(model, 1, Sampling(top_k=5))
    for options in ({"seed": 1}, {"seed": 2, "stop_tokens": (3, 8)}, {"seed": 1}):
        sampling = Sampling(top_k=5, max_new_tokens=40, **options)
        found = model.generate([[1, 2]], sampling=sampling, decoder=decoder)
        assert found == model.generate([[1, 2]], sampling=sampling)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_a_cuda_graph_gives_the_tokens_of_direct_steps(config):
    """Also after sequences were finished and begun again. The graph is captured once."""
    model = random_model(config).cuda()
    draws = draw_numbers([1, 2, 3], 8).cuda()
    results = []
    for use_graph in (False, None):
        decoder = Decoder(model, 3, SAMPLING, use_graph=use_graph)
        begin(decoder)
        found = [decoder.step(numbers) for numbers in draws]
        graph = decoder._graph
        assert (graph is None) == (use_graph is False)
        decoder.cache.finish([1])
        found += [decoder.step(numbers)[::2] for numbers in draws]
        begin(decoder)
        found += [decoder.step(numbers) for numbers in draws]
        assert decoder._graph is graph
        assert decoder.cache.host_lengths == decoder.cache.lengths.tolist()
        results.append(found)
    assert results[0] == results[1]

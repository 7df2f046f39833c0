"""Rotary embeddings of every scaling kind against transformers' own, at the sizes of real models."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.models.reference import ropes
from xtf import nn
from xtf.models.config import decode_rope

EPS = torch.finfo(torch.float32).eps
HALF = 64
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn from deepseek": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                           "beta_slow": 1,
                           "mscale": 0.707, "mscale_all_dim": 1.0, "truncate": False},
    "yarn over nearly all dims": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 262144},
    "yarn with half of the mscales": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
                                      "mscale": 0.707},
    "yarn without a factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 2048,
                              "beta_fast": None},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 4096,
                 "short_factor": [1 + i / 100 for i in range(HALF)], "long_factor": [1 + i / 2 for i in range(HALF)]},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
}
MOST = 16384                                                                  # max_position_embeddings


def theirs(rope: dict, half: int, most: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    cfg = LlamaConfig(hidden_size=2 * half, num_attention_heads=1, head_dim=2 * half, max_position_embeddings=most,
                      rope_parameters=dict(rope))
    cos, sin = LlamaRotaryEmbedding(cfg)(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


def ours(kind: nn.AnyRope, half: int, lengths: list[int],
         dtype=torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    segments = torch.tensor([[0, *torch.tensor(lengths).cumsum(0).tolist()]], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cos, sin = nn.rope(kind, 2 * half, positions, segments, dtype)
    return list(zip(cos[0].split(lengths), sin[0].split(lengths), strict=True))


def assert_equal_rope(rope: dict, half: int, most: int, lengths: list[int]) -> None:
    """Frequencies go through at most ten float32 operations, so an angle is off by 10 eps of itself, and cos and sin by
    as much."""
    kind = decode_rope({"rope_parameters": dict(rope)}, most)
    for length, got in zip(lengths, ours(kind, half, lengths), strict=True):
        position = torch.arange(length)[:, None]
        for a, b in zip(got, theirs(rope, half, most, length), strict=True):
            assert a.dtype == torch.float32 and ((a - b).abs() <= 10 * EPS * (1 + position)).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("theta", [10000.0, 1000000])
def test_each_kind_equals_transformers(name, theta):
    """Documents shorter than, equal to and longer than every length that a kind looks at, in one pack."""
    assert_equal_rope(KINDS[name] | {"rope_theta": theta}, HALF, MOST, [3, 2048, 4096, 4097, 16384, 16385, 20000])


@given(st.data())
@settings(max_examples=100)
def test_drawn_kinds_equal_transformers(data):
    half, most = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.sampled_from([8, 16, 64]))
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    assert_equal_rope(data.draw(ropes(half)), half, most, lengths)


def test_the_kinds_differ():
    """Each kind moves the angles of a long document: no comparison above is of a thing with itself."""
    tables = {name: ours(decode_rope({"rope_parameters": dict(rope)}, MOST), HALF, [20000])[0][0]
              for name, rope in KINDS.items()}
    names = list(tables)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            assert (tables[a] - tables[b]).abs().max() > 0.1, (a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precision(dtype):
    """At least float32, and in float64 the angles are exact products of float32 frequencies."""
    (cos, _), = ours(nn.Rope(), HALF, [50], dtype)
    assert cos.dtype == torch.promote_types(dtype, torch.float32)
    frequencies = nn.inverse_frequencies(nn.Rope(), 2 * HALF, torch.tensor([[0, 50]]), 50)
    assert frequencies.dtype == torch.float32
    exact = (torch.arange(50).double()[:, None] * frequencies.double()).cos()
    assert (cos[:, :HALF].double() - exact).abs().max() <= (0 if dtype == torch.float64 else 50 * EPS)


def test_document_lengths_skip_empty_documents():
    segments = torch.tensor([[0, 0, 2, 2, 5, 5], [0, 5, 5, 5, 5, 5]], dtype=torch.int32)
    assert nn.document_lengths(segments, 5).tolist() == [[2, 2, 3, 3, 3], [5] * 5]

import pytest
import torch

from tritium.bench.pages import _attention
from tritium.bench.pages._matmuls import tile_order
from tritium.bench.pages.pictures import IMAGES, PICTURES, main
from tritium.errors import InputError
from tritium.kernels.attention import _documents
from tritium.kernels.core.op import INTERPRET

LENGTHS = (220, 90, 460, 254)


def visible(T: int, window: int | None, lengths: tuple[int, ...]) -> torch.Tensor:
    """Return which query (row) sees which key (column)."""
    ahead = torch.arange(T)[:, None] - torch.arange(T)
    seen = (ahead >= 0) & (ahead < (window or T))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=int))
    return seen & (document[:, None] == document) if lengths else seen


@pytest.mark.plain
@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkdv"])
@pytest.mark.parametrize(
    ("T", "window", "lengths"),
    [(1024, None, ()), (1000, 300, ()), (384, 20, ()), (1024, None, LENGTHS)],
)
def test_drawn_tiles_cover_the_pairs_that_attention_sees_once(kernel, T, window, lengths):
    seen = visible(T, window, lengths)
    covered = torch.zeros(T, T, dtype=torch.int64)
    for tile in _attention.walk(kernel, T, window=window, lengths=lengths):
        queries, keys = slice(*tile["queries"]), slice(*tile["keys"])
        covered[queries, keys] += 1
        part = seen[queries, keys]
        assert part.any()
        assert tile["is_masked"] or part.all()
    assert covered.max() == 1
    assert not (seen & (covered == 0)).any()


@pytest.mark.skipif(not INTERPRET, reason="runs the kernel that lists the tiles")
def test_the_drawn_list_of_tiles_is_the_list_of_the_kernel():
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    work, _ = _documents.schedule(starts, sum(LENGTHS), 64)
    expected, _ = _attention._documents(LENGTHS, 64)
    assert [tuple(pair) for pair in work.tolist() if pair[0] >= 0] == expected


@pytest.mark.plain
def test_each_tile_of_a_gemm_is_drawn_once():
    order = tile_order(rows=12, columns=5, programs=7)
    tiles = [tile for tiles in order for tile in tiles]
    assert sorted(tiles) == [(row, column) for row in range(12) for column in range(5)]
    assert [tiles[0] for tiles in order] == [(row, 0) for row in range(7)]


@pytest.mark.plain
def test_every_picture_is_committed():
    assert set(PICTURES) <= {path.stem for path in IMAGES.glob("*.svg")}


@pytest.mark.plain
def test_the_command_draws_the_same_picture_again(tmp_path, capsys):
    assert main(["block-bytes", "--out", str(tmp_path)]) == 0
    first = (tmp_path / "block-bytes.svg").read_bytes()
    assert main(["block-bytes", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "block-bytes.svg").read_bytes() == first
    assert b"<svg" in first
    assert "block-bytes.svg" in capsys.readouterr().out


@pytest.mark.plain
@pytest.mark.slow
def test_the_command_draws_every_picture(tmp_path):
    assert main(["--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(PICTURES)


@pytest.mark.plain
def test_an_unknown_picture_raises():
    with pytest.raises(InputError, match="unknown picture 'gem'; did you mean 'gemm'"):
        main(["gem"])

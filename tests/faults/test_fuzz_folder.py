"""The files of runs and datasets with any content: each reader returns, or raises InputError.

No reader may raise another exception, take longer than two seconds, or write outside the folder.
`pytest -m slow tests/faults/test_fuzz_folder.py` tries more examples.
"""

import base64
import contextlib
import copy
import json
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritium.__main__ import dispatch
from tritium.errors import InputError
from tritium.model import GPT, GPTConfig
from tritium.train import loop, session
from tritium.train.commands import cli as command_line
from tritium.train.config import TrainConfig
from tritium.train.data.build import build
from tritium.train.data.dataset import open_dataset
from tritium.train.data.shards import HEADER_BYTES, Shard
from tritium.train.data.tokenizers.tokenizer import Tokenizer, hash_parts
from tritium.train.run.folder import is_unstarted, read_run
from tritium.train.run.metrics import read_metrics
from tritium.train.run.models import open_model
from tritium.train.run.samples import add_sample, last_sample
from tritium.train.storage.files import seal, unseal

pytestmark = pytest.mark.plain

EXAMPLES = [50, pytest.param(1000, marks=pytest.mark.slow)]
# A small alphabet: hypothesis needs seconds to prepare the complete one.
TEXT = st.text("abn_ 019./\\\0\n\u00e9\ud800\U0001f600", max_size=8)
NAMES = ["../x.bin", "/etc/hostname", ".", "..", "step-1", "x" * 5000, "cuda:9", "stdlib"]
NUMBERS = [-1, 0, 1, 2, 257, 10**9, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.5, 1e-45, 1e308]
NUMBERS += [float("inf"), float("nan")]
SCALARS = st.one_of(
    st.sampled_from([None, True, False, *NUMBERS]),
    st.sampled_from(NUMBERS),
    st.sampled_from(NAMES),
    TEXT,
)
VALUES = st.one_of(
    SCALARS, SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(TEXT, SCALARS, max_size=2)
)
NESTED = b'{"train": ' + b"[" * 100_000


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Return the path of each value in a JSON value."""
    found = [path]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:3])
    else:
        return found
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def changed(draw, base: object) -> object:
    """Return a JSON value with one to three values replaced, removed or added."""
    result = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(result)[1:] or [("",)]))
        inside = result
        for key in path:
            inside = inside[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "remove":
            del inside[last]
        elif action == "add" and isinstance(inside, dict):
            inside[draw(TEXT)] = draw(VALUES)
        else:
            inside[last] = draw(VALUES)
        if not isinstance(result, dict) or not result:
            break
    return result


def contents(base: dict, write=lambda record: json.dumps(record).encode()) -> st.SearchStrategy:
    """Return a strategy for the content of a file of JSON: changed records, or any bytes."""
    good = write(base)
    return st.one_of(
        changed(base).map(write),
        changed(base).map(write),
        changed(base).map(lambda record: json.dumps(record).encode()),
        st.binary(max_size=200),
        st.integers(0, len(good) - 1).map(lambda size: good[:size]),
        st.just(NESTED),
    )


def check(
    strategy: st.SearchStrategy, examples: int, file: Path, read, *, seconds: int = 2
) -> None:
    """Call `read` with each content in `file`. Only InputError may be raised."""
    read()  # the first call imports modules
    good = file.read_bytes()
    outside = file.parents[1] / "sentinel"
    outside.write_text("mine")
    before = set(outside.parent.glob("*"))

    @settings(
        max_examples=examples,
        deadline=1000 * seconds,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(content: bytes) -> None:
        file.write_bytes(content)
        with contextlib.suppress(InputError):
            read()

    try:
        run()
    finally:
        file.write_bytes(good)
    read()
    assert outside.read_text() == "mine"
    assert set(outside.parent.glob("*")) == before


def seal_any(record: object) -> bytes:
    return seal(record) if isinstance(record, dict) else json.dumps(record).encode()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dataset and a run of one step, in a folder of their own."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "a.txt").write_text("the quick brown fox " * 40)
    build(root / "data", [root / "a.txt"], "bytes", shard_tokens=300, progress=False)
    config = TrainConfig.from_options(
        data=(str(root / "data"),),
        n_layer=1, n_head=2, d_model=16, context_tokens=16, batch_size=2, steps=1,
        sample_tokens=1, eval_tokens=16, device="cpu", checkpoint_interval=5,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "plot_loss", lambda run: None)
        loop.start(config, root / "run")
    return root


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_config_of_a_run(folders, examples):
    run = folders / "run"
    file = run / "config.json"

    def read():
        is_unstarted(run)
        read_run(run)
        open_model(run).load()

    base = unseal(file.read_bytes())
    check(contents(base, seal_any), examples, file, read)


@pytest.mark.slow
def test_any_options_of_a_resumed_run(folders, monkeypatch, capfd):
    """The command prints one line and ends with status 2, or resumes the finished run."""
    run = folders / "run"
    monkeypatch.setattr(session, "plot_loss", lambda run: None)
    file = run / "config.json"
    base = unseal(file.read_bytes())
    good = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def read():
        status = command_line.run(dispatch, ["train", "--resume", str(run)])
        err = capfd.readouterr().err
        for path, content in good.items():
            if path != file:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
        assert status in (0, 2), err
        assert status == 0 or err.count("tritium: ") == 1, err

    def without_steps(record: object) -> bytes:
        """Set the number of steps to that of the checkpoint, so that the run does not train."""
        if isinstance(record, dict) and isinstance(record.get("train"), dict):
            record["train"]["steps"] = 1
        return seal_any(record)

    check(changed(base).map(without_steps), 300, file, read, seconds=20)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_dataset_json(folders, examples):
    file = folders / "data" / "dataset.json"
    base = unseal(file.read_bytes())
    strategy = contents(base, seal_any)
    check(strategy, examples, file, lambda: open_dataset(folders / "data"))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_state_of_a_checkpoint(folders, examples):
    step = folders / "run" / "checkpoints" / "step-1"
    file = step / "state.json"
    base = unseal(file.read_bytes())
    check(contents(base, seal_any), examples, file, lambda: open_model(step).load())


def lines(record: object) -> bytes:
    rows = record.values() if isinstance(record, dict) else [record]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_metrics(folders, examples):
    run = folders / "run"
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    base = {str(number): row for number, row in enumerate(rows)}

    def read():
        for row in (*read_metrics(run)[0], *read_metrics(run)[1]):
            assert 0 <= abs(row["step"]) < 2**63
            # The loss is null if it was not finite.
            assert abs((row.get("loss") or 0) + (row.get("val_loss") or 0)) <= 1e309

    strategy = contents(base, lines) | st.binary(max_size=50).map(lambda x: b"".join([x, b"\n"]))
    check(strategy, examples, file, read)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_samples(folders, examples):
    run = folders / "run"
    file = run / "samples.txt"

    def read():
        last_sample(run)
        add_sample(run, 1, "x")
        assert last_sample(run) == "x\n"

    pieces = st.sampled_from([b"--- step ", b"1", b"99999999999999999999", b"\n", b"\xff", b"text"])
    strategy = st.lists(pieces, max_size=9).map(b"".join) | st.binary(max_size=50)
    check(strategy, examples, file, read)


@st.composite
def any_shard(draw, good: bytes) -> bytes:
    """Return a shard with changed bytes, and with correct checksums where `draw` decides so."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(8, len(content) - 1) | st.integers(8, HEADER_BYTES))
        content[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    if draw(st.booleans()) and len(content) > HEADER_BYTES:
        if draw(st.booleans()):
            content[64:68] = struct.pack("<I", zlib.crc32(content[HEADER_BYTES:]))
        content[68:72] = struct.pack("<I", zlib.crc32(content[:68]))
    return bytes(content)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_shard(folders, examples):
    file = folders / "data" / "train-00000.bin"

    def read():
        shard = Shard(file)
        assert shard[0 : len(shard)].max() < shard.vocab_size

    strategy = any_shard(file.read_bytes()) | st.binary(max_size=200)
    check(strategy, examples, file, read)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_tokenizer(folders, examples):
    file = folders / "data" / "tokenizer.json"
    base = json.loads(file.read_text())
    base["pieces"] = base["pieces"][:5]
    kinds = {
        "bpe": {"pattern": r"\s+|\S+", "pieces": ["YQ==", "Yg==", "YWI=", "ZW5k"]},
        "chars": {"pieces": ["YQ==", "Yg==", "ZW5k"]},
    }

    def write(record: object) -> bytes:
        try:
            pieces = [base64.b64decode(piece) for piece in record["pieces"]]
            parts = (record["kind"].encode(), record["pattern"].encode(), *pieces)
            record = record | {"sha256": hash_parts(*parts)}
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        return json.dumps(record).encode()

    def read():
        tokenizer = Tokenizer.load(file)
        assert tokenizer.decode(tokenizer.encode("ab")) == "ab"

    bases = [base, *(base | {"kind": kind} | fields for kind, fields in kinds.items())]
    check(st.one_of([contents(each, write) for each in bases]), examples, file, read)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_config_of_a_published_model(folders, examples):
    folder = folders / "published"
    if not folder.exists():
        shape = GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=50, context_tokens=8)
        GPT(shape).save_pretrained(folder)
    file = folder / "config.json"
    base = json.loads(file.read_text())
    check(contents(base), examples, file, lambda: open_model(folder).load())

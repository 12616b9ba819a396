import pytest

from tritium.errors import InputError
from tritium.train.config import TrainConfig
from tritium.train.recipes import RECIPES, recipe
from tritium.train.start.config_file import read_config, to_toml

pytestmark = pytest.mark.plain


@pytest.mark.parametrize("name", RECIPES)
def test_toml_of_a_configuration_reads_back(name, tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(to_toml(recipe(name)))
    assert read_config(file) == recipe(name)


def test_a_file_changes_some_options_of_a_recipe(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('recipe = "laptop"\ndata = ["a b.txt"]\nn-layer = 2  # small\nlr = 1\n')
    assert read_config(file) == recipe("laptop").with_options(data=("a b.txt",), n_layer=2, lr=1)
    file.write_text("steps = 7\n")
    assert read_config(file) == TrainConfig(steps=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1\nn_layers = 2", "a.toml:2: unknown option 'n_layers'; did you mean 'n_layer'?"),
        ("lr = 1\n\nsteps = 'x'", "a.toml:3: steps: expected int, got 'x'"),
        ("recipe = 'gpt-2'", "a.toml:1: unknown recipe 'gpt-2'; did you mean 'gpt2'"),
        ("recipe = ['laptop']", "a.toml:1: recipe: expected str, got ['laptop']"),
        ("lr = 1\nn-layer = 2\nn_layer = 3", "a.toml:2: n_layer: expected one value, got two"),
        ("lora = '4'", "a.toml:1: lora: expected int, got '4'"),
        ("lr = ", "a.toml: expected TOML, got a syntax error"),
        ("[model]\nn_layer = 2", "a.toml: expected options without tables"),
        ("steps = 0", "a.toml: steps: expected 1 or more"),
        ("task = 'instruct'", "a.toml: expected the options of a run of `tritium train`"),
    ],
)
def test_bad_files_raise_with_the_line(text, message, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(InputError) as error:
        read_config(tmp_path / "a.toml")
    assert message in str(error.value)


def test_the_command_takes_a_file_and_the_config_of_a_run(tritium, error_of, tiny, tmp_path):
    assert tritium(*tiny, "--steps", 2)[0] == 0
    run = tmp_path / "run"
    words = ("--out", tmp_path / "again", "--steps", 3)
    assert tritium("train", "--config", run / "config.json", *words)[0] == 0
    first, second = (read_config(tmp_path / name / "config.json") for name in ("run", "again"))
    assert second == first.with_options(steps=3)

    status, out, _ = tritium("train", "--config", run / "config.json", "--print-config")
    assert status == 0
    (tmp_path / "b.toml").write_text(out)
    assert read_config(tmp_path / "b.toml") == first
    assert "got both" in error_of("train", "laptop", "--config", tmp_path / "b.toml")
    assert "expected one file, got none" in error_of("train", "--config")
    for content in ("{}", '{"train": []}'):
        (tmp_path / "c.json").write_text(content)
        line = error_of("train", "--config", tmp_path / "c.json")
        assert "expected the config.json of a run" in line
    assert "missing.toml" in error_of("train", "--config", tmp_path / "missing.toml")


def test_folder_without_config_raises(tmp_path):
    with pytest.raises(InputError, match="expected a TOML file or the folder of a run"):
        read_config(tmp_path)

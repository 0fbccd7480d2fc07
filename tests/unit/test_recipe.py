"""Recipes: every problem with its key and line, overrides, and the files that a recipe names."""

import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import Run, UserError, load
from pipeline.load import RENAMED, environment_overrides
from pipeline.recipe import GPUS, LANGUAGES, QUANTIZATIONS, REGIONS, Data, Gguf, Lora, Recipe

REPOSITORY = Path(__file__).parents[2]
DATA = "data: {train: talks.jsonl}\n"


def fields(section: type) -> str:
    return ", ".join(name for name in section.__dataclass_fields__ if name != "path")


def write(text: str | bytes, name: str = "mine.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def repository(_apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is about the shipped recipes."""
    monkeypatch.chdir(REPOSITORY)


# Each name stands for three of the one before.
BOMB = "a: &a [x,x,x]\n" + "".join(
    "{1}: &{1} [*{0},*{0},*{0}]\n".format(*pair) for pair in zip("abcdefghijklmnop", "bcdefghijklmnop", strict=False)
)
BAD = {
    "unknown key with a near one": (
        "train: {epohcs: 2}\n" + DATA,
        ["mine.yaml:1: train.epohcs: unknown key: did you mean 'epochs'?"],
    ),
    "unknown key with none near": (
        DATA + "zebra: 1\n",
        [f"mine.yaml:2: zebra: unknown key: choose one of: {fields(Recipe)}"],
    ),
    "unknown section stands where its name stands": (
        DATA + "trian:\n\n  epochs: 1\n",
        ["mine.yaml:2: trian: unknown key: did you mean 'train'?"],
    ),
    "name is the file's": (
        DATA + "name: other\n",
        [f"mine.yaml:2: name: unknown key: choose one of: {fields(Recipe)}"],
    ),
    "unknown key of a section in a section": (
        DATA + "train:\n  lora:\n    dropuot: 0\n",
        ["mine.yaml:4: train.lora.dropuot: unknown key: did you mean 'dropout'?"],
    ),
    "text for a number": (
        DATA + "train:\n  epochs: many\n",
        ["mine.yaml:3: train.epochs: 'many' is not a number"],
    ),
    "fraction for a whole number": (
        DATA + "seed: 1.5\n",
        ["mine.yaml:2: seed: 1.5 is not a whole number"],
    ),
    "true for a number": (
        DATA + "seed: true\n",
        ["mine.yaml:2: seed: True is not a whole number"],
    ),
    "nothing for a number": (
        DATA + "seed:\n",
        ["mine.yaml:2: seed: None is not a whole number"],
    ),
    "not a finite number": (
        DATA + "train: {learning_rate: .nan, warmup_ratio: .inf}\n",
        [
            "mine.yaml:2: train.learning_rate: nan is not a number",
            "mine.yaml:2: train.warmup_ratio: inf is not a number",
        ],
    ),
    "number for a text": (
        DATA + "base_model: 135\n",
        ["mine.yaml:2: base_model: 135 is not text"],
    ),
    "text for a truth value": (
        DATA + "train: {gradient_checkpointing: maybe}\n",
        ["mine.yaml:2: train.gradient_checkpointing: 'maybe' is not true or false"],
    ),
    "list with an item that is no text": (
        "data: {train: [talks.jsonl, 3]}\n",
        ["mine.yaml:1: data.train: 3 is not text"],
    ),
    "keys that preferences do not read": (
        DATA + "train: {method: dpo, neftune: 5, packing: on, lora: {dropout: 0.1}}\n",
        [
            "mine.yaml:2: train.neftune: train.method=dpo does not read it: take it out",
            "mine.yaml:2: train.packing: train.method=dpo packs no rows: set it to auto or off",
            "mine.yaml:2: train.lora.dropout: train.method=dpo compares two models, which dropout would blur: set it "
            "to 0",
        ],
    ),
    "losses of preferences that do not go together": (
        DATA + "train: {method: dpo, dpo: {loss_type: [exo_pair, aot], loss_weights: [1]}}\n",
        [
            "mine.yaml:2: train.dpo.loss_weights: 1 of them for 2 losses: give one to each",
            "mine.yaml:2: train.dpo.loss_type: exo_pair needs train.dpo.label_smoothing: set it to 1e-3",
            "mine.yaml: train.batch_size: aot compares the pairs of a batch: set it to 2 or more",
        ],
    ),
    "a batch without neighbours": (
        DATA + "train: {method: kto, batch_size: 1}\n",
        ["mine.yaml:2: train.batch_size: kto compares the answers of a batch: set it to 2 or more, say 8"],
    ),
    "a model that no process has whole": (
        DATA + "train: {method: orpo}\nlaunch: {strategy: fsdp}\n",
        ["mine.yaml:3: launch.strategy: train.method=orpo asks the whole model in each process: set ddp or zero2"],
    ),
    "no loss": (
        DATA + "train: {method: dpo, dpo: {loss_type: []}}\n",
        ["mine.yaml:2: train.dpo.loss_type: is empty: name one, as sigmoid"],
    ),
    "below a bound": (
        DATA + "serve: {port: 0}\n",
        ["mine.yaml:2: serve.port: 0 is out of range: give a whole number from 1 to 65535"],
    ),
    "above a bound": (
        "data:\n  train: talks.jsonl\n  validation: 0.6\n",
        ["mine.yaml:3: data.validation: 0.6 is out of range: give a number from 0 to 0.5"],
    ),
    "below the only bound": (
        DATA + "train: {max_length: 8}\n",
        ["mine.yaml:2: train.max_length: 8 is out of range: give a whole number at least 16"],
    ),
    "unknown choice": (
        DATA + "train: {tuner: lroa}\n",
        [
            "mine.yaml:2: train.tuner: 'lroa' is unknown: did you mean 'lora'? choose one of: "
            "full, lora, qlora, dora, rslora"
        ],
    ),
    "unknown quantization": (
        DATA + "gguf: {types: [Q8_0, q4_k_m]}\n",
        [
            "mine.yaml:2: gguf.types: 'q4_k_m' is unknown: did you mean 'Q4_K_M'? "
            f"choose one of: {', '.join(QUANTIZATIONS)}"
        ],
    ),
    "what no library and no table knows": (
        "data:\n  train: talks.jsonl\n  clean: {languages: [en, english], phone_region: us}\nplan: {gpu: h1000}\n",
        [
            f"mine.yaml:3: data.clean.languages: 'english' is unknown: choose one of: {', '.join(LANGUAGES.split())}",
            "mine.yaml:3: data.clean.phone_region: 'us' is unknown: did you mean 'US'? choose one of: "
            + ", ".join(REGIONS.split()),
            "mine.yaml:4: plan.gpu: 'h1000' is unknown: did you mean 'h100-80gb'? choose one of: "
            + ", ".join(GPUS.split()),
        ],
    ),
    "what trains nothing": (
        DATA + "train: {learning_rate: 0, checkpoint_minutes: 0, lora: {targets: [], alpha: 0}}\n",
        [
            "mine.yaml:2: train.learning_rate: 0 is out of range: give a number at least 1e-09",
            "mine.yaml:2: train.checkpoint_minutes: 0 is out of range: give a number at least 0.001",
            "mine.yaml:2: train.lora.alpha: 0 is out of range: give a number at least 0.001",
            "mine.yaml:2: train.lora.targets: is empty: name layers of the base, or all-linear for all of them",
        ],
    ),
    "one port for two": (
        DATA + "serve:\n  port: 8001\n  ui_port: 8001\n",
        ["mine.yaml:4: serve.ui_port: 8001 is serve.port too: give each a port of its own"],
    ),
    "key given twice": (
        DATA + "seed: 1\nseed: 2\n",
        ["mine.yaml:3: seed: given twice: keep one"],
    ),
    "no data": (
        "base_model: random\n",
        ["mine.yaml: data.train: missing: name files or folders of conversations, or a dataset of the Hub"],
    ),
    "empty list of data": (
        "base_model: random\ndata: {train: []}\n",
        ["mine.yaml:2: data.train: missing: name files or folders of conversations, or a dataset of the Hub"],
    ),
    "served type where no GGUF is made": (
        DATA + "gguf: {types: []}\nserve: {type: F16}\n",
        ["mine.yaml:3: serve.type: 'F16' is not made: add it to gguf.types ()"],
    ),
    "served type that is not made": (
        DATA + "serve:\n  type: Q6_K\n",
        ["mine.yaml:3: serve.type: 'Q6_K' is not made: add it to gguf.types (Q8_0)"],
    ),
    "origin with a path": (
        DATA + "serve:\n  origins: [http://here/chat]\n",
        ["mine.yaml:3: serve.origins: 'http://here/chat' is no origin: give scheme://host:port, without a path"],
    ),
    "value for a section": (
        DATA + "gguf: Q8_0\n",
        [f"mine.yaml:2: gguf: 'Q8_0' is not a section: write its keys below it ({fields(Gguf)})"],
    ),
    "list for a section": (
        "data: [talks.jsonl]\n",
        [f"mine.yaml:1: data: ['talks.jsonl'] is not a section: write its keys below it ({fields(Data)})"],
    ),
    "value for a section in a section": (
        DATA + "train:\n  lora: 16\n",
        [f"mine.yaml:3: train.lora: 16 is not a section: write its keys below it ({fields(Lora)})"],
    ),
    "section for a value": (
        DATA + "base_model:\n\n  name: random\n",
        ["mine.yaml:2: base_model: is one value, not a section"],
    ),
    "unknown tag": (
        DATA + "base_model: !!python/name:os.system\n",
        [
            "mine.yaml:2: base_model: cannot be read: "
            "could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"
        ],
    ),
    "date that does not exist": (
        DATA + "seed: 2020-13-45\n",
        ["mine.yaml:2: seed: cannot be read: month must be in 1..12"],
    ),
    "list that holds itself": (
        "data:\n  train: &a [*a]\n",
        [
            "mine.yaml:2: train: cannot be read: found unconstructable recursive node",
            "mine.yaml: data.train: missing: name files or folders of conversations, or a dataset of the Hub",
        ],
    ),
    "section that holds itself": (
        "data: &a\n  train: *a\n",
        ["mine.yaml: nested too deeply, or in itself: a recipe has sections of keys and values"],
    ),
    "aliases that multiply": (
        DATA + BOMB + "base_model: *j\n",
        ["mine.yaml: its aliases multiply to more than 500,000 characters: write it plainly"],
    ),
    "mappings that multiply": (
        DATA + BOMB.replace("[", "{<<: [").replace("]", "]}").replace("<<: [x,x,x]", "x: 1"),
        ["mine.yaml: its aliases multiply to more than 500,000 characters: write it plainly"],
    ),
    "a file that no person wrote": (
        DATA + "base_model: " + "x" * 500_000,
        ["mine.yaml: has 500,039 bytes: a recipe has at most 500,000"],
    ),
    "a number to base 60 without end": (
        DATA + "seed: 1" + ":59" * 150_000,
        ["mine.yaml: not YAML: a number of 450,001 characters"],
    ),
    "nested without end": (
        "data: {train: " + "[" * 9999 + "]" * 9999 + "}",
        ["mine.yaml: nested too deeply, or in itself: a recipe has sections of keys and values"],
    ),
    "names that no file can have": (
        f"data: {{train: [{'x' * 300}], heldout: ~nobody-here/x}}\n"
        f'base_model: ~nobody-here/x\nchat_template: "a\\0b"\n',
        [
            f"mine.yaml:1: data.train: '{'x' * 300}': the system takes no such name (File name too long)",
            "mine.yaml:1: data.heldout: '~nobody-here/x': there is no such user, whose home folder it names",
            "mine.yaml:3: chat_template: 'a\\x00b': the system takes no such name (embedded null byte)",
            "mine.yaml:2: base_model: '~nobody-here/x': there is no such user, whose home folder it names",
        ],
    ),
    "not a mapping": (
        "- base: random\n",
        ["mine.yaml:1: a recipe is a mapping of keys to values, not a list or a single value"],
    ),
    "not YAML": (
        DATA + "base_model: [random\n",
        ["mine.yaml:3: not YAML: expected ',' or ']', but got '<stream end>'"],
    ),
    "tab for indentation": (
        "data:\n\ttrain: a\n",
        ["mine.yaml:2: not YAML: found character '\\t' that cannot start any token"],
    ),
    "two documents": (
        DATA + "---\n" + DATA,
        ["mine.yaml:2: not YAML: but found another document"],
    ),
    "zero byte": (
        "base_model: a\0b\n",
        ["mine.yaml: not YAML: unacceptable character #x0000: special characters are not allowed"],
    ),
    "not UTF-8": (
        b"base_model: caf\xe9\n",
        ["mine.yaml: not YAML: 'utf-8' codec can't decode byte 0xe9 in position 15: invalid continuation byte"],
    ),
    "text for a section of free names": (
        DATA + "chat_template_arguments: thinking\n",
        ["mine.yaml:2: chat_template_arguments: 'thinking' is not a section: write its names and values below it"],
    ),
    "empty name of a file": (
        "data: {train: ''}\n",
        ["mine.yaml:1: data.train: '': is empty: name a file or a folder"],
    ),
    "several at once, in their order": (
        "bsae_model: random\ndata: {train: 7}\ntrain:\n  epochs: 0\n  lora: {rnak: 2}\ngguf: {types: [Q9]}\n"
        "seed: 1\nseed: 1\n",
        [
            "mine.yaml:8: seed: given twice: keep one",
            "mine.yaml:1: bsae_model: unknown key: did you mean 'base_model'?",
            "mine.yaml:2: data.train: 7 is not text",
            "mine.yaml:4: train.epochs: 0 is out of range: give a number at least 0.01",
            "mine.yaml:5: train.lora.rnak: unknown key: did you mean 'rank'?",
            f"mine.yaml:6: gguf.types: 'Q9' is unknown: choose one of: {', '.join(QUANTIZATIONS)}",
        ],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_told_with_place_and_key(case: str) -> None:
    text, problems = BAD[case]
    with pytest.raises(UserError) as raised:
        load(write(text))
    assert list(raised.value.problems) == problems


BAD_OVERRIDES = {
    "train.epohcs=2": "SET: train.epohcs: unknown key: did you mean 'epochs'?",
    "train=2": "SET: train: 2 is not a section: write its keys below it",
    "base_model.name=x": "SET: base_model: is one value, not a section",
    "seed=many": "SET: seed: 'many' is not a whole number",
    "seed=2020-13-45": "SET: seed: '2020-13-45' is not a whole number",
    "seed": "SET: 'seed' is not key=value",
    "seed=["
    + ",".join(BOMB.replace("a: ", "", 1).splitlines()[:1])
    + "".join(f",{line.partition(': ')[2]}" for line in BOMB.splitlines()[1:])
    + "]": "SET: seed: its aliases multiply to more than 500,000 characters",
    "seed=" + "[" * 9999: "SET: seed: '[[[[",
    "=1": "SET: '=1' is not key=value",
    "gguf.types=[Q8": f"SET: gguf.types: '[Q8' is unknown: choose one of: {', '.join(QUANTIZATIONS)}",
    "serve.type=Q2_K": "SET: serve.type: 'Q2_K' is not made: add it to gguf.types (Q8_0)",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_told(override: str) -> None:
    with pytest.raises(UserError) as raised:
        load(write(DATA), [override])
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(BAD_OVERRIDES[override])


def test_a_key_that_is_set_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"^SET: train\.lora\.rank: given twice: keep one$"):
        load(write(DATA + "train: {lora: {rank: 2}}\n"), ["train.lora.rank=4", "seed=1", "train.lora.rank=8"])


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "0.00001", "'1e-5'", "1.0e-05"])
def test_a_number_is_read_however_it_is_written(written: str) -> None:
    assert load(write(DATA + f"train: {{learning_rate: {written}}}")).train.learning_rate == 1e-5


@pytest.mark.parametrize("written", ["on", "'on'", "off", "auto"])  # YAML takes on and off for true and false
def test_on_and_off_are_words_where_a_key_has_them(written: str) -> None:
    wanted = written.strip("'")
    assert load(write(DATA + f"train: {{packing: {written}}}")).train.packing == wanted
    assert load(write(DATA), [f"train.packing={written}"]).train.packing == wanted


def test_a_whole_number_stays_one() -> None:
    seed = load(write(DATA + "seed: 3.0")).seed
    assert seed == 3 and isinstance(seed, int)


def test_a_single_value_is_a_list_of_one() -> None:
    assert load(write(DATA + "gguf: {types: Q6_K}")).gguf.types == ("Q6_K",)


def test_an_empty_section_is_its_defaults() -> None:
    assert load(write(DATA + "gguf:\n")).gguf == Gguf()


def test_an_override_changes_its_key_and_no_other() -> None:
    recipe = load(
        write(DATA + "train:\n  epochs: 9\n  lora: {rank: 4}\n"), ["train.lora.alpha=7", "gguf.types=[F16,Q6_K]"]
    )
    assert (recipe.train.epochs, recipe.train.lora, recipe.gguf.types) == (9, Lora(4, 7), ("F16", "Q6_K"))


def test_set_takes_a_quoted_path_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "train.epochs=2 data.train='my own file.jsonl'")
    recipe = load(write(DATA), environment_overrides())
    assert (recipe.train.epochs, recipe.data.train) == (2, ("my own file.jsonl",))


def test_set_with_an_open_quote_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "base_model='random")
    with pytest.raises(UserError, match=r"^SET=base_model='random: No closing quotation: close the quotes$"):
        environment_overrides()


def resolve(name: str = "mine.yaml", **variables: str) -> str:
    """What resolve says; it succeeds."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    for data in ("talks.jsonl", "a b.jsonl"):
        Path(data).touch()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.resolve", write(DATA, name)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr


def test_set_is_kept_for_later_commands() -> None:
    assert resolve(SET="seed=7 data.train='a b.jsonl'") == ""
    assert resolve() == "mine: with SET='seed=7 data.train=a b.jsonl' as before; 'SET=' drops it\n"
    assert (load("mine.yaml").seed, load("mine.yaml").data.train) == (7, ("a b.jsonl",))


def test_an_empty_set_drops_what_was_kept() -> None:
    resolve(SET="seed=7")
    resolve(SET="")
    assert resolve() == ""
    assert load("mine.yaml").seed == 0


def test_a_bad_set_keeps_nothing() -> None:
    resolve(SET="seed=7")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        resolve(SET="sede=8")
    assert raised.value.stderr == "error: SET: sede: unknown key: did you mean 'seed'?\n"
    assert load("mine.yaml").seed == 7


def test_given_overrides_replace_the_kept_ones() -> None:
    resolve(SET="seed=7")
    assert load("mine.yaml", ["train.epochs=2"]).seed == 0


def test_one_run_folder_is_not_of_two_recipes() -> None:
    resolve("a/mine.yaml", SET="seed=7")
    Path("b").mkdir()
    with pytest.raises(UserError) as raised:
        load(write(DATA, "b/mine.yaml"))
    owned = "runs/mine is the run of a/mine.yaml, a recipe of the same file name: rename one of them"
    assert str(raised.value) == f"b/mine.yaml: {owned}"
    Path("link.d").symlink_to("a")
    assert load("link.d/mine.yaml").seed == load(str(Path("a/mine.yaml").resolve())).seed == 7


def test_a_recipe_keeps_its_run_when_it_or_the_whole_folder_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("here/a/mine.yaml", SET="seed=7")
    Path("here/a").rename("here/b")
    assert load("here/b/mine.yaml").seed == 7
    resolve("here/b/mine.yaml")
    Path("runs").rename("here/runs")
    Path("here").rename("there")
    monkeypatch.chdir("there")
    assert load("b/mine.yaml").given == "b/mine.yaml"


@pytest.mark.parametrize(
    ("file", "given"),
    [("recipes/own.yaml", "own"), ("recipes/own.yml", "recipes/own.yml"), ("a/own.yaml", "a/own.yaml")],
)
def test_what_to_run_next_names_the_recipe_as_make_takes_it(file: str, given: str) -> None:
    Path(file).parent.mkdir()
    with pytest.raises(UserError, match=f"^runs/own/data.json is missing: run 'make data RECIPE={given}' first$"):
        Run.of(load(write(DATA, file))).receipt("data")


def test_a_file_is_sought_beside_the_recipe() -> None:
    Path("mine").mkdir()
    write(b"", "mine/talks.jsonl")
    write(b"", "mine/chat.jinja")
    recipe = load(write(DATA + "chat_template: chat.jinja\n", "mine/r.yaml"))
    assert (recipe.data.train, recipe.chat_template) == (("mine/talks.jsonl",), "mine/chat.jinja")


def test_files_that_are_missing_are_told_at_once_where_the_line_begins() -> None:
    recipe = (
        "chat_template: no.jinja\nbase_model: ./no\ndata:\n  train: [no.jsonl, no/no.csv.gz, 'no*.txt', me/set@v1:en]\n"
        "  heldout: no.jsonl\neval: {classification: no.tsv=a|b, tasks: [hellaswag, no.yaml]}\nserve: {port: 3000}\n"
    )
    with pytest.raises(UserError) as raised:
        load(write(recipe), complete=True)
    missing = "no such file, here or beside the recipe: correct the path"
    assert list(raised.value.problems) == [
        f"mine.yaml:4: data.train: 'no.jsonl': {missing}",
        f"mine.yaml:4: data.train: 'no/no.csv.gz': {missing}",
        f"mine.yaml:4: data.train: 'no*.txt': {missing}",
        f"mine.yaml:5: data.heldout: 'no.jsonl': {missing}",
        f"mine.yaml:6: eval.classification: 'no.tsv': {missing}",
        f"mine.yaml:6: eval.tasks: 'no.yaml': {missing}",
        f"mine.yaml:1: chat_template: 'no.jinja': {missing}",
        f"mine.yaml:2: base_model: './no': {missing}",
        "mine.yaml: serve.ui_port: 3000 is serve.port too: give each a port of its own",
    ]
    assert load(write(recipe.replace("3000", "8000"))).chat_template == "no.jinja", "for what is trained already"


def test_a_file_of_the_current_folder_comes_first() -> None:
    Path("mine").mkdir()
    write(b"", "mine/talks.jsonl")
    write(b"", "talks.jsonl")
    assert load(write(DATA, "mine/r.yaml")).data.train == ("talks.jsonl",)


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(write("data: {train: ~/talks.jsonl}")).data.train == ("/home/someone/talks.jsonl",)


SHIPPED = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))


def test_the_recipes_that_the_project_promises_are_shipped() -> None:
    assert {"assistant", "tiny", "qwen3-0.6b", "qwen3-8b-qlora"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_its_data_is_there(repository: None, name: str) -> None:
    recipe = load(name, [])
    assert recipe.name == name
    assert [file for file in (*recipe.data.train, recipe.data.heldout) if file and not Path(file).is_file()] == []


MISSING = {
    "asistant": "no recipe recipes/asistant.yaml: did you mean 'assistant'? Choose one of: ",
    "zebra": "no recipe recipes/zebra.yaml: give the path of your own file or choose one of: ",
    "no/such.yaml": "no recipe no/such.yaml: give the path of your own file or choose one of: ",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_recipe_that_is_not_there_is_told_with_those_that_are(repository: None, name: str) -> None:
    with pytest.raises(UserError) as raised:
        load(name)
    assert str(raised.value) == MISSING[name] + ", ".join(SHIPPED)


@pytest.mark.parametrize("name", ["My Recipe.yaml", "A.yaml", "-x.yaml", "ü.yaml"])
def test_a_name_that_is_no_run_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError) as raised:
        load(write(DATA, name))
    allowed = "use lower-case letters, digits, '.', '_' and '-' in the file's name"
    assert str(raised.value) == f"recipe name {name[:-5]!r}: {allowed}"


@pytest.mark.parametrize("module", ["train.data", "train.base", "train.run", "convert.merge", "convert.gguf"])
def test_a_bad_recipe_fails_at_once_without_torch(module: str) -> None:
    probe = (
        "import runpy, sys\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "finally: print(sorted({'torch', 'transformers', 'llama_cpp'} & set(sys.modules)))"
    )
    before = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-c", probe, write(DATA + "sede: 1\n")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    busy = os.times().children_user - before
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert done.stderr == "error: mine.yaml:2: sede: unknown key: did you mean 'seed'?\n"
    assert busy < 1, "processor seconds, as other tests may keep the machine busy"


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_unknown_and_the_new_one_is_suggested(old: str) -> None:
    with pytest.raises(UserError) as raised:
        load(write(DATA), [f"{old}=1"])
    assert str(raised.value) == f"SET: {old}: unknown key: did you mean '{RENAMED[old]}'?"
    section = operator.attrgetter(old.rpartition(".")[0])(Recipe("x")) if "." in old else Recipe("x")
    assert hasattr(section, RENAMED[old])

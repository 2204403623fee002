"""What comes from outside cannot run code, get out of its folder or carry secrets away."""

from __future__ import annotations

import ast
import importlib.metadata
import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.version import Version
from test_trainer import config, trainer

import gpo_fast
from gpo_fast import Request
from gpo_fast.config import RunSpec
from gpo_fast.launch import load_model
from gpo_fast.report import write_report
from gpo_fast.rollout.openai_backend import OpenAIBackend, ServerError
from gpo_fast.run_files import RunFiles, last_checkpoint

PACKAGE = Path(gpo_fast.__file__).parent
ROOT = PACKAGE.parent

# -- loading ------------------------------------------------------------------------------------------------------

# Functions and modules that run code found in what they read or are given; the package uses none of them.
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
UNSAFE_OPTIONS = {("allow_pickle", "True"), ("weights_only", "False"), ("shell", "True"), ("trust_remote_code", "True")}


def unsafe_parts(source: str) -> set[str]:
    """What in a module's source could run code that comes from outside."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            options = {(k.arg, ast.unparse(k.value)) for k in node.keywords if k.arg}
            found |= {ast.unparse(node.func)} & UNSAFE_CALLS | {f"{n}={v}" for n, v in options & UNSAFE_OPTIONS}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names} & UNSAFE_MODULES
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[0]} & UNSAFE_MODULES
            found |= {f"{node.module}.{a.name}" for a in node.names} & UNSAFE_CALLS
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_code_that_could_run_code_would_be_found(source: str) -> None:
    assert unsafe_parts(source)


def test_the_package_loads_nothing_that_can_run_code() -> None:
    modules = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert len(modules) > 80
    for module in modules:
        assert not unsafe_parts(module.read_text(encoding="utf-8")), module


def test_a_model_of_pickles_is_refused_and_code_of_models_is_off(tmp_path: Path) -> None:
    assert RunSpec("m", "d", ["exact_match"]).trust_remote_code is False
    ran = tmp_path / "ran"
    model = tmp_path / "model"
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    text = (model / "config.json").read_text()
    foreign = '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, '
    (model / "config.json").write_text(text.replace("{", foreign, 1).replace('"llama"', '"own"'))
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w').write('ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(model))
    assert not ran.exists()


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    trainer(tmp_path / "run", max_steps=2).train()
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        assert (checkpoint / name).exists()
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Evil()))
    trainer(tmp_path / "run", max_steps=3).train(resume_from_checkpoint=True)
    assert not (tmp_path / "ran").exists(), "the pickle of the arguments is never read"
    newest = last_checkpoint(tmp_path / "run")
    assert newest is not None
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (newest / name).read_bytes()
        (newest / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(Exception, match=r"weights_only|Weights only"):
            trainer(tmp_path / "run", max_steps=4).train(resume_from_checkpoint=str(newest))
        assert not (tmp_path / "ran").exists()
        (newest / name).write_bytes(kept)


# -- the report ---------------------------------------------------------------------------------------------------

MARK = "document.documentElement.setAttribute('data-ran', '1')"
ATTACKS = (
    f"<script>{MARK}</script>",
    f'<img src=x onerror="{MARK}">',
    f'"><svg onload="{MARK}">',
    f"</pre></style><script>{MARK}</script>",
    f"' onmouseover='{MARK}' autofocus onfocus='{MARK}",
    f'<iframe srcdoc="<script>parent.{MARK}</script>"></iframe>',
    f'<a href="javascript:{MARK}" id=a></a><form action="javascript:{MARK}"><input autofocus onfocus="{MARK}">',
    f"{{{{ ''.__class__ }}}}<details open ontoggle=\"{MARK}\">",
    f'<meta http-equiv="refresh" content="0;url=javascript:{MARK}"><base href="javascript:{MARK}//">',
)


BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")


def shown(browser: str, page: Path, profile: Path) -> str:
    """The page's document after its scripts have run."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    options = [f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True).stdout


def hostile_report(folder: Path) -> Path:
    """The report of a run whose every text is an attack."""
    evil = "\n".join(ATTACKS)
    files = RunFiles(folder)
    files.begin(
        dict.fromkeys(("title", "model", "algorithm", "device"), evil) | {"notes": [evil], "config": {evil: evil}}, 0
    )
    step = {"text": evil, "num_tokens": 3, "value": 0.5, "standard_error": 0.1, "advantage": -0.5}
    record = {"step": 1, "prompt": evil, "reward": 0.0, "steps": [step], "critical": 0, "reset": "before"}
    record |= {"criterion": evil, "num_rollouts": 4, "num_tokens": 9, "answer": evil}
    files.trajectories([{**record, "branches": [{"text": evil, "reward": 1.0, "kind": evil}]}])
    return write_report(folder)


class Markup(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def could_run(self) -> set[str]:
        """Tags and attributes that can run a script or load something."""
        tags = self.tags & {"script", "img", "iframe", "object", "embed", "form", "input", "base", "link", "audio"}
        return tags | {n for n, v in self.attributes if n.startswith("on") or n in ("src", "href") or "script:" in v}


def test_no_text_of_a_model_becomes_markup(tmp_path: Path) -> None:
    for attack in ATTACKS:
        assert Markup(f"<body><p title='{attack}'>{attack}").could_run(), "the attacks are markup if not escaped"
    page = hostile_report(tmp_path / "run").read_text(encoding="utf-8")
    assert not Markup(page).could_run()
    assert page.count("&lt;script&gt;") >= 8, "what the model wrote is shown as text"


def test_no_text_of_a_model_runs_in_a_browser(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on this machine")
    naive = tmp_path / "naive.html"
    naive.write_text("<!doctype html><body>" + "\n".join(ATTACKS))
    assert 'data-ran="1"' in shown(browser, naive, tmp_path / "profile"), "the attacks work where nothing is escaped"
    report = shown(browser, hostile_report(tmp_path / "run"), tmp_path / "profile")
    assert "data-ran" not in report.replace("setAttribute('data-ran'", "")
    assert report.count("&lt;script&gt;") >= 8, "what the model wrote is shown as text"


# -- files --------------------------------------------------------------------------------------------------------


def test_a_run_cannot_make_the_report_read_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"reward": 0.5, "step": 1}\n')
    for path in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "link.jsonl"):
        files = RunFiles(tmp_path / "run")
        files.begin({"title": "x", "compare": {"label": "y", "metrics": path}}, 0)
        if not (tmp_path / "run" / "link.jsonl").is_symlink():
            (tmp_path / "run" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
        with pytest.raises(ValueError, match="not in the run's folder"):
            write_report(tmp_path / "run")


def test_a_run_writes_in_its_folder_only(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", max_steps=2, run_name="../../outside")
    run.train()
    write_report(tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# -- secrets ------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_files_of_a_run(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", max_steps=2, hub_token="hf_hunter2")
    assert run.args.hub_token == "hf_hunter2"
    run.train()
    run.save_model(str(tmp_path / "run" / "model"))
    run.create_model_card()
    write_report(tmp_path / "run")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.name == "training_args.bin" for p in files)
    assert any(p.name == "README.md" for p in files)
    for path in files:
        assert b"hunter2" not in path.read_bytes(), path


def test_no_secret_is_in_errors_and_logs(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    remote = OpenAIBackend(
        "http://127.0.0.1:1/v1", "m", tiny.tokenizer(), api_key="hunter2", max_retries=1, backoff=0.01
    )
    with caplog.at_level(logging.DEBUG), pytest.raises(ServerError) as caught:
        remote.generate([Request([3])])
    assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert caplog.text
    with pytest.raises(ValueError, match="optim") as refused:
        config(tmp_path, hub_token="hunter2", optim="adamm")
    assert "hunter2" not in str(refused.value)


# -- dependencies -------------------------------------------------------------------------------------------------

# Vulnerabilities that matter to how this package uses its dependencies, with the first version that has none of them.
# Kept by hand and not complete; last gone through on 2026-11-26. `make audit` asks a database.
FIXED = {
    "torch": ("2.6.0", "CVE-2025-32434: torch.load(weights_only=True) could run code"),
    "transformers": ("4.53.0", "CVE-2025-6921 and others: regular expressions that take for ever"),
    "jinja2": ("3.1.6", "CVE-2025-27516 and others: templates that leave the sandbox; xmlattr injection"),
    "pyyaml": ("5.4", "CVE-2020-14343: yaml could run code"),
    "ray": ("2.52.0", "CVE-2025-62593: a web page could run code through the dashboard"),
}


def test_lower_bounds_exclude_known_vulnerabilities() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(re.search(r">=|==", r) for r in project["dependencies"])
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    seen = set()
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower()
        lowest = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")]
        if name in FIXED:
            seen.add(name)
            assert max(lowest) >= Version(FIXED[name][0]), f"{requirement} lets in {FIXED[name][1]}"
    assert seen == set(FIXED)


def test_installed_versions_are_none_of_the_vulnerable_ones() -> None:
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    checked = [name for name in FIXED if name in installed]  # Ray is an extra
    assert len(checked) >= len(FIXED) - 1
    for name in checked:
        assert Version(installed[name]) >= Version(FIXED[name][0]), f"{name} {installed[name]}: {FIXED[name][1]}"

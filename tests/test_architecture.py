"""Who may import whom, what may be imported where, and that importing stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import those of its own layer and of lower ones.
LAYERS = [
    {"kernels"},
    {"models", "data", "metrics", "verdict"},
    {"recipes", "diffusion"},
    {"engine", "checkpoint", "trackers", "costs", "graphs"},
    {
        "context",
        "generator",
        "classification",
        "scoring",
        "methods",
        "run_folder",
        "results",
        "report",
        "figures",
        "memorisation",
        "feasible",
        "opinions",
        *("provenance", "model_card", "pretrained"),
    },
    {"pipeline", "sweep", "apply", "evaluation", "export", "profiling"},
    {"cli", "train", "use_run", "completion", "facade"},
]
STDLIB_ONLY = {
    *("config", "fields", "stages", "presets", "benchmark_presets", "arguments"),
    *("compare", "compared_runs", "comparison_tables", "published", "tabular", "streams"),
}
USES_ACCELERATE = {"train", "pipeline", "context", "engine", "checkpoint", "trackers", "run_folder"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    for path in sorted([*ROOT.glob("ddb_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, parts[1] if parts[0] == "ddb_fast" and len(parts) > 1 else parts[0]


def imported(path):
    """(module, names) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, tuple(alias.name for alias in node.names)


def own_layers(path):
    """The second component of every `ddb_fast.X` that a file imports."""
    for module, names in imported(path):
        if module == "ddb_fast":
            yield from names
        elif module.startswith("ddb_fast."):
            yield module.split(".")[1]


@pytest.mark.parametrize(
    ("path", "layer"), [pytest.param(p, m, id=str(p.relative_to(ROOT))) for p, m in modules()]
)
def test_imports_go_down_the_layers(path, layer):
    if layer == "__init__":
        return
    tops = {module.split(".")[0] for module, _ in imported(path)}
    own = {name for name in own_layers(path) if not name.startswith("__")}
    if layer in STDLIB_ONLY:
        assert tops - {"ddb_fast"} <= set(sys.stdlib_module_names)
        assert own <= STDLIB_ONLY
        return
    if layer == "kernels":
        assert "ddb_fast" not in tops
    else:
        assert "triton" not in tops
    if "accelerate" in tops:
        assert layer in USES_ACCELERATE
    too_high = {name for name in own - STDLIB_ONLY if LEVEL[name] > LEVEL[layer]}
    assert not too_high
    if layer == "recipes":
        assert own <= {"recipes"}, "recipes plug into anybody's loop"


def test_every_module_has_a_layer():
    names = {name for _, name in modules()} - {"__init__"}
    assert names == set(LEVEL) | STDLIB_ONLY


def test_no_module_hides_a_package_when_the_launcher_puts_our_folder_first():
    known = set(sys.stdlib_module_names) | {
        "datasets",
        "evaluate",
        "kernels",
        "torch",
        "accelerate",
    }
    assert not {path.stem for path in ROOT.glob("ddb_fast/*")} & known


def test_configuration_imports_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import ddb_fast.presets, ddb_fast.arguments;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert set(answer.stdout.split()) - {"ddb_fast"} <= set(sys.stdlib_module_names)


def test_importing_the_package_does_not_touch_the_kernel_package_name():
    code = "import ddb_fast.kernels, sys; print('kernels' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_nothing_names_a_machine_or_pickles():
    forbidden = ["/wo" + "rk/", "/ro" + "ot/", "weights_only=F" + "alse", "import pi" + "ckle"]
    suffixes = {".py", ".md", ".toml", ".txt", ".j2", ".yml", ".cpp", ".json", ""}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert tracked
    for name in tracked:
        path = ROOT / name
        if path.suffix in suffixes and path.is_file():
            text = path.read_text("utf-8")
            assert not [word for word in forbidden if word in text], name

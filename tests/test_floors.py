"""The house rules that can be read off the source: imports, sizes, paths, files, random draws.

Each rule is a function from a module's source to what is wrong with it; the last tests plant a
breach of each rule and see it caught.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minirlhf"
# A module may import its own floor and those below.
FLOORS = {
    5: {"lab", "runs", "cli", "many_runs", "terminal", "__main__"},
    4: {
        "audit",
        "facts",
        "autopsy",
        "push",
        "whatif",
        "battery",
        "subject",
        "two_answers",
        "spurious",
        "monitor",
        "recipe",
        "instead",
        "upstream",
        "pair_rules",
        "score_rules",
        "remedies",
        "evidence",
        "remedy_table",
        "sweep",
        "drift",
        "drift_config",
        "seeds",
        "shipped",
    }
    | {"doctor"},
    3: {"sft", "preferences", "reward", "ppo", "ppo_config", "critic", "oracle"}
    | {"pocket", "bridge", "debias", "dpo"},
    2: {"desk", "deskfile", "generate"},
    1: {
        "text",
        "model",
        "optim",
        "kl",
        "advantages",
        "rollout",
        "store",
        "metrics",
        "cores",
        "workers",
        "__init__",
    },
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
CORE = {"text", "model", "generate", "kl", "advantages", "rollout", "reward", "ppo", "oracle"}
# PPO and rewards know nothing of customer support
NO_SUPPORT = CORE | {"autopsy", "optim", "store", "metrics", "ppo_config", "critic"}
NO_SUPPORT |= {"cores", "pocket", "bridge", "push", "whatif", "battery", "subject", "two_answers"}
NO_SUPPORT |= {"workers", "debias", "dpo"}
SUPPORT = {"desk", "deskfile", "preferences"}
DRAWING = {"matplotlib", "ipywidgets", "IPython", "PIL"}


def modules():
    """{name below minirlhf: source}; a package's parts are "lab.plots"."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(name, source):
    """Every module imported anywhere in the source, absolute: {"minirlhf.kl.kl_k1", "torch"}."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["minirlhf", *name.split(".")][: -node.level]
                base = ".".join([*here, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def own(name, source):
    """The top names of our own modules that it imports: {"kl", "lab"}."""
    tops = {full.split(".")[1] for full in imports(name, source) if full.startswith("minirlhf.")}
    return {top if top in FLOOR else "__init__" for top in tops}


def floor_breaches(name, source):
    top = name.split(".")[0]
    if top not in FLOOR:
        return [f"{name} has no floor: give it a line in FLOORS"]
    used = own(name, source) - {top}
    bad = [f"{name} (floor {FLOOR[top]}) imports {m}" for m in used if FLOOR[m] > FLOOR[top]]
    if top in NO_SUPPORT:
        bad += [f"{name} imports {m}: it must not know the support desk" for m in used & SUPPORT]
    foreign = {full.split(".")[0] for full in imports(name, source)}
    if top != "lab":
        bad += [f"{name} imports {m}: only lab draws" for m in foreign & DRAWING]
    return bad


class _NoTypeImports(ast.NodeTransformer):
    """Drops `if TYPE_CHECKING:`: what only a type checker imports makes no cycle."""

    def visit_If(self, node):
        return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else node


def cycles(sources):
    graph = {}
    for name, source in sources.items():
        top = name.split(".")[0]
        source = ast.unparse(_NoTypeImports().visit(ast.parse(source)))
        graph.setdefault(top, set()).update(own(name, source) - {top, "__init__"})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def long_parts(name, source):
    bad = [f"{name}: {n} lines, the limit is 350"] if (n := len(source.splitlines())) > 350 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > 40:
                bad.append(f"{name}.{node.name}: {length} lines, the limit is 40")
    return bad


def code_lines(source):
    """Lines that hold code: no blank line, comment or docstring, of which there may be many."""
    tree, held = ast.parse(source), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
            node.body = [
                s
                for s in body
                if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ] or [ast.Pass(lineno=body[0].lineno, end_lineno=body[0].lineno)]
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr | ast.arg | ast.keyword):
            held |= {node.lineno, getattr(node, "end_lineno", node.lineno)}
    return len(held)


def over_budget(sources):
    """Compactness is a promise: the core, all that a number comes out of, and what draws it."""
    lines = {name: code_lines(source) for name, source in sources.items()}
    parts = {
        "core": (1500, {name for name in lines if name.split(".")[0] in CORE}),
        "package without lab": (6500, {name for name in lines if name.split(".")[0] != "lab"}),
        "lab": (3000, {name for name in lines if name.split(".")[0] == "lab"}),
    }
    sums = {part: (sum(lines[n] for n in names), top) for part, (top, names) in parts.items()}
    return [f"{part}: {n} lines, the limit is {top}" for part, (n, top) in sums.items() if n > top]


def _mode(call):
    """The mode of an open call where it is written out, else "r"."""
    words = [k.value for k in call.keywords if k.arg == "mode"] + call.args
    texts = [w.value for w in words if isinstance(w, ast.Constant) and isinstance(w.value, str)]
    return next((t for t in texts if set(t) <= set("rwxabt+")), "r")


def _is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def unsafe(name, source):
    """What breaks on another system, another day, or in somebody else's random numbers."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        last = text.rsplit(".", 1)[-1]
        given = {k.arg for k in node.keywords}
        reads_text = last in {"read_text", "write_text"} and "encoding" not in given
        reads_text &= "." in text and not text.startswith("store.")  # ours writes UTF-8 itself
        opens = last in {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
        # a method called open whose first argument is no text is not Path.open(mode)
        opens &= not ("." in text and last == "open" and node.args and not _is_text(node.args[0]))
        mode = _mode(node) if last == "open" or "mode" in given or node.args else "w+b"
        if reads_text or (opens and "b" not in mode and "encoding" not in given):
            bad.append(f"{name}:{node.lineno}: {text} without encoding")
        if last in {"chmod", "symlink_to", "symlink", "link_to", "fork", "getuid"}:
            bad.append(f"{name}:{node.lineno}: {text} is not for Windows")
        if text in {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all"}:
            bad.append(f"{name}:{node.lineno}: {text} touches the global RNG")
        if text.startswith(("np.random.", "numpy.random.")) and last[0].islower():
            allowed = last == "default_rng" and (node.args or node.keywords)
            bad += [] if allowed else [f"{name}:{node.lineno}: {text} touches the global RNG"]
    foreign = imports(name, source)
    for banned in ("os.path", "pickle", "random", "shelve"):
        if any(full == banned or full.startswith(banned + ".") for full in foreign):
            bad.append(f"{name}: imports {banned}")
    if "os.path" in source and "os.path" not in " ".join(foreign):
        bad.append(f"{name}: os.path, use pathlib")
    return bad


SOURCES = modules()


@pytest.mark.parametrize("name", SOURCES)
def test_module_keeps_the_house_rules(name):
    source = SOURCES[name]
    assert not floor_breaches(name, source)
    assert not long_parts(name, source)
    assert not unsafe(name, source)
    assert ast.get_docstring(ast.parse(source)), "a module opens with what it is"


def test_no_import_cycles():
    assert not cycles(SOURCES)


def test_line_budgets():
    assert not over_budget(SOURCES)


@pytest.mark.parametrize(
    ("name", "source", "caught"),
    [
        ("kl", "from minirlhf.ppo import PPO", "kl (floor 1) imports ppo"),
        ("kl", "from . import ppo", "kl (floor 1) imports ppo"),
        ("kl", "def f():\n    from .ppo import PPO", "kl (floor 1) imports ppo"),
        ("sft", "import minirlhf.audit as a", "sft (floor 3) imports audit"),
        ("ppo", "from minirlhf import desk", "ppo imports desk"),
        ("reward", "from minirlhf.preferences import Pairs", "reward imports preferences"),
        ("drift", "from minirlhf.lab.plots import draw", "drift (floor 4) imports lab"),
        ("audit", "import matplotlib.pyplot as plt", "audit imports matplotlib"),
        ("cli", "from ipywidgets import HTML", "cli imports ipywidgets"),
        ("attic", "x = 1", "attic has no floor"),
    ],
)
def test_planted_import_is_caught(name, source, caught):
    assert any(caught in text for text in floor_breaches(name, source))


def test_allowed_imports_pass():
    assert not floor_breaches("lab.plots", "import matplotlib\nfrom .live import LiveFigure")
    assert not floor_breaches("ppo", "from minirlhf.kl import kl_k1\nfrom minirlhf import reward")
    assert not floor_breaches("cli", "from minirlhf import __version__, doctor")


def test_planted_cycle_is_caught():
    both = {"kl": "from minirlhf.model import x", "model": "from minirlhf import kl"}
    assert cycles(both)
    assert not cycles({"kl": both["kl"], "model": ""})
    for_types = "if TYPE_CHECKING:\n    from minirlhf.model import x"
    assert not cycles({**both, "kl": for_types})


def test_planted_length_is_caught():
    body = "def f():\n" + "    x = 1\n" * 39
    assert not long_parts("kl", body)
    assert long_parts("kl", body + "    x = 1\n") == ["kl.f: 41 lines, the limit is 40"]
    assert long_parts("kl", "x = 1\n" * 351)
    assert over_budget({"kl": "x = 1\n" * 1501}) == ["core: 1501 lines, the limit is 1500"]
    assert over_budget({"desk": "x = 1\n" * 6501}) == [
        "package without lab: 6501 lines, the limit is 6500"
    ]
    assert over_budget({"lab.plots": "x = 1\n" * 3001}) == ["lab: 3001 lines, the limit is 3000"]


@pytest.mark.parametrize(
    "source",
    [
        "open('a')",
        "path.open('w')",
        "open('a', mode='w')",
        "path.read_text()",
        "path.write_text('x')",
        "tempfile.NamedTemporaryFile('w')",
        "path.chmod(0o600)",
        "path.symlink_to(other)",
        "import os.path",
        "import os\nos.path.join('a', 'b')",
        "from os.path import join",
        "import pickle",
        "import random",
        "torch.manual_seed(0)",
        "np.random.seed(0)",
        "np.random.rand(3)",
        "np.random.default_rng()",
    ],
)
def test_planted_unsafe_call_is_caught(source):
    assert unsafe("kl", source)


@pytest.mark.parametrize(
    "source",
    [
        "open('a', encoding='utf-8')",
        "path.open('rb')",
        "cache.open(steps)",
        "open('b', 'wb')",
        "path.write_text('x', encoding='utf-8')",
        "tempfile.NamedTemporaryFile('w', encoding='utf-8')",
        "tempfile.TemporaryFile(dir=there)",
        "np.random.default_rng(7)",
        "np.random.Generator(np.random.PCG64(7))",
        "torch.Generator().manual_seed(7)",
        "store.write_text(path, 'x')",
    ],
)
def test_safe_call_passes(source):
    assert not unsafe("kl", source)

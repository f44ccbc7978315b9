"""The house rules that can be read off the source: floors, circles, sizes, paths, files, draws.

Each rule is a function from a module's source to what is wrong with it; the last tests plant a
breach of each rule and see it caught.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import density
import pytest

PACKAGE = density.PACKAGE
# The floors, from the ground: a wing imports itself and those below it. Wings on one floor know
# nothing of each other. "core" are the files at the top of the package.
FLOORS = (
    {"engine"},
    {"core"},
    {"desk"},
    {"oracle", "audit"},
    {"autopsy"},
    {"drift"},
    {"remedies"},
    {"sweeps"},
    {"lab"},
    {"cli"},
)
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}
NO_SUPPORT = {"engine", "core", "oracle", "autopsy"}  # these know nothing of customer support
DRAWING = {"matplotlib", "ipywidgets", "IPython", "PIL"}
PAIRS = 35  # parallel assignments of two parts left in the package: this may only fall
ENTRIES = 30  # what a newcomer who opens the package sees at once


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


def wing_of(name):
    """The wing of a module: "autopsy" of "autopsy.parts", "core" of "kl"."""
    return name.split(".")[0] if "." in name or name in FLOOR else "core"


def own(name, source):
    """Our own modules that it imports: {"kl", "autopsy.parts"}; a face is the wing's name."""
    found = set()
    for full in imports(name, source):
        if full.startswith("minirlhf."):
            inner = full.removeprefix("minirlhf.")
            parts = inner.split(".")
            known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            found.add(next((m for m in known if m in MODULES), inner))
    return found - {name, "__version__"}


def floor_breaches(name, source):
    wing = wing_of(name)
    if wing not in FLOOR:
        return [f"{name} stands in no wing: give {wing} a place in FLOORS"]
    bad = []
    for other in own(name, source):
        theirs = wing_of(other)
        up = FLOOR[theirs] > FLOOR[wing] or (FLOOR[theirs] == FLOOR[wing] and theirs != wing)
        bad += [f"{name} (floor {FLOOR[wing]}) imports {other}"] if up else []
        bad += [f"{name} imports the face {other}: import its module"] if other in FLOOR else []
        if wing in NO_SUPPORT and theirs == "desk":
            bad.append(f"{name} imports {other}: it must not know the support desk")
        if wing == "desk" and theirs == "core" and other != "text":
            bad.append(f"{name} imports {other}: of the core the desk knows text alone")
    foreign = {full.split(".")[0] for full in imports(name, source)}
    if wing != "lab":
        bad += [f"{name} imports {m}: only lab draws" for m in foreign & DRAWING]
    return bad


def cycles(sources):
    """A circle of modules, what only a type checker imports included."""
    graph = {name: own(name, source) - {"__init__"} for name, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


# 350 and 40 while code was squeezed; written out, with reasons at the lines, it takes a little more
LONGEST_FILE = 400
LONGEST_FUNCTION = 45


def long_parts(name, source):
    bad = []
    lines = len(source.splitlines())
    if lines > LONGEST_FILE:
        bad.append(f"{name}: {lines} lines, the limit is {LONGEST_FILE}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                part = f"{name}.{node.name}"
                bad.append(f"{part}: {length} lines, the limit is {LONGEST_FUNCTION}")
    return bad


def squeezed(name, source):
    """Arguments packed into a tuple on one line, to be splatted into a call on another."""
    bad = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        parts = [*ast.walk(function)]
        packed = {
            target.id
            for node in parts
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in (node for node in parts if isinstance(node, ast.Call)):
            splats = {ast.unparse(x.value) for x in call.args if isinstance(x, ast.Starred)}
            bad += [f"{name}:{call.lineno}: {x} is packed to be splatted" for x in splats & packed]
    return bad


def parallel(source):
    """(line, parts) of each assignment of a tuple written out to a tuple of names."""
    return [
        (node.lineno, len(node.value.elts))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.List)
        if any(isinstance(target, ast.Tuple | ast.List) for target in node.targets)
    ]


def abreast(name, source):
    """Three things or more assigned on one line."""
    return [
        f"{name}:{line}: {parts} parts in one assignment, write one a line"
        for line, parts in parallel(source)
        if parts > 2
    ]


def out_of_limits(wings):
    """What is larger or denser than its wing may be."""
    bad = []
    for name, limit in density.LIMITS.items():
        part = wings.get(name, density.Size(0, 0))
        if part.lines > limit.lines:
            bad.append(f"{name}: {part.lines} lines, the limit is {limit.lines}")
        if part.density > limit.tokens:
            bad.append(f"{name}: {part.density:.1f} tokens a line, the limit is {limit.tokens}")
    return bad + [f"{name} has no limit" for name in wings.keys() - density.LIMITS.keys()]


def too_dense(files):
    """Files beyond what any file may be."""
    return [
        f"{path.name}: {part.density:.1f} tokens a line, the limit is {density.DENSEST}"
        for path, part in files.items()
        if part.density > density.DENSEST
    ]


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
        reads_text &= "." in text and not text.startswith("files.")  # ours writes UTF-8 itself
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


def _faces(sources):
    """The modules by the name they are imported by: a wing's __init__ is the wing."""
    return {name.removesuffix(".__init__") for name in sources} - {"__init__"}


SOURCES = modules()
MODULES = _faces(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_module_keeps_the_house_rules(name):
    source = SOURCES[name]
    assert not floor_breaches(name, source)
    assert not long_parts(name, source)
    assert not squeezed(name, source)
    assert not abreast(name, source)
    assert not unsafe(name, source)
    assert ast.get_docstring(ast.parse(source)), "a module opens with what it is"


def test_no_circle_of_imports():
    assert not cycles(SOURCES)


def test_wings_keep_their_limits_of_lines_and_of_density():
    assert not out_of_limits(density.wings())
    assert not too_dense(density.files())


def test_no_more_pairs_are_assigned_at_once():
    pairs = [f"{name}:{line}" for name in SOURCES for line, _ in parallel(SOURCES[name])]
    assert len(pairs) <= PAIRS, pairs


def test_the_listing_is_seen_at_once():
    seen = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(seen) <= ENTRIES, sorted(seen)


@pytest.mark.parametrize(
    ("name", "source", "caught"),
    [
        ("kl", "from minirlhf.desk.world import Desk", "kl (floor 1) imports desk.world"),
        ("kl", "from . import desk", "kl (floor 1) imports desk"),
        ("kl", "def f():\n    from .autopsy.parts import split", "kl (floor 1) imports autopsy"),
        ("sft", "import minirlhf.audit.auditor as a", "sft (floor 1) imports audit.auditor"),
        ("engine.files", "from minirlhf.model import Transformer", "(floor 0) imports model"),
        ("oracle.chain", "from minirlhf.audit.monitor import stream", "imports audit.monitor"),
        ("autopsy.parts", "from minirlhf.desk import world", "must not know the support desk"),
        ("desk.world", "from minirlhf.reward import RewardModel", "the desk knows text alone"),
        ("drift.run", "from minirlhf.lab.plots import draw", "drift.run (floor 5) imports lab"),
        ("drift.run", "from minirlhf.autopsy import split", "imports the face autopsy"),
        ("audit.auditor", "import matplotlib.pyplot as plt", "audit.auditor imports matplotlib"),
        ("cli.main", "from ipywidgets import HTML", "cli.main imports ipywidgets"),
        ("attic.boxes", "x = 1", "attic.boxes stands in no wing"),
    ],
)
def test_planted_import_is_caught(name, source, caught):
    assert any(caught in text for text in floor_breaches(name, source))


def test_allowed_imports_pass():
    assert not floor_breaches("lab.plots", "import matplotlib\nfrom .picture import LiveFigure")
    assert not floor_breaches("ppo", "from minirlhf.kl import kl_k1\nfrom minirlhf import reward")
    assert not floor_breaches("cli.main", "from minirlhf import __version__")
    assert not floor_breaches("desk.world", "from minirlhf.text import Vocabulary")


def test_planted_circle_is_caught():
    both = {"kl": "from minirlhf.model import x", "model": "from minirlhf import kl"}
    assert cycles(both)
    assert not cycles({"kl": both["kl"], "model": ""})
    for_types = "if TYPE_CHECKING:\n    from minirlhf.model import x"
    assert cycles({**both, "kl": for_types})  # a type is an import too


def test_planted_length_is_caught():
    body = "def f():\n" + "    x = 1\n" * 44
    assert not long_parts("kl", body)
    assert long_parts("kl", body + "    x = 1\n") == ["kl.f: 46 lines, the limit is 45"]
    assert long_parts("kl", "x = 1\n" * 401)


def test_planted_size_and_density_are_caught():
    plain = density.size("x = 1\n" * 1601)
    assert (plain.lines, plain.density) == (1601, 3.0)
    assert out_of_limits({"core": plain}) == ["core: 1601 lines, the limit is 1600"]
    squeezed = density.size("a, b, c, d = (f(x, y), g(x, y), h(x), k(y))\n")
    assert squeezed == density.Size(1, 33)
    assert out_of_limits({"oracle": squeezed}) == ["oracle: 33.0 tokens a line, the limit is 12.0"]
    assert too_dense({Path("kl.py"): squeezed})
    assert out_of_limits({"attic": plain}) == ["attic has no limit"]


def test_planted_splat_is_caught():
    assert squeezed("kl", "def f(a, b):\n    given = (a, b)\n    return g(*given)\n")
    assert not squeezed("kl", "def f(*given):\n    return g(*given)\n")
    assert not squeezed("kl", "def f(a):\n    parts = a.split()\n    return g(*parts)\n")


def test_planted_parallel_assignment_is_caught():
    said = ["kl:2: 3 parts in one assignment, write one a line"]
    assert abreast("kl", "import x\na, b, c = x.a, x.b, x.c\n") == said
    assert abreast("kl", "def f(x):\n    x.a, (b, d), c = 0, x.b, []\n")
    assert abreast("kl", "a = (b, c, d) = (1, 2, 3)\n")
    assert parallel("low, high = 0.0, 1.0\n[a, b] = b, a\n") == [(1, 2), (2, 2)]
    assert not abreast("kl", "low, high = 0.0, 1.0\n")
    assert not parallel("a, b, c = x.shape\na = b = (1, 2, 3)\na, b = zip(*c)\n")


def test_what_is_no_code_is_not_counted():
    source = '"""A module\n\nof two lines."""\n\n# why\nx: int = 1  # so\n"""what x is"""\n'
    assert density.size(source) == density.Size(1, 5)
    assert density.size('said = f"{x + 1} of {y}"\n') == density.Size(1, 3)
    assert density.size('said = """\ntext\n"""\n') == density.Size(3, 3)


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
        "files.write_text(path, 'x')",
    ],
)
def test_safe_call_passes(source):
    assert not unsafe("kl", source)

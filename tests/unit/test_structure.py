"""The house keeps its shape: rooms in their order, no circle, no crowded folder and no long file.

Linters refuse most of this where it is written (see the ruff.toml of each room). Here it is looked at as a whole: what
a list of banned names cannot say, and the files that a linter makes an exception of.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {
    "sidecast": "sidecast",
    "trainer": "sidecast.trainer",
    "nowcaster_service": "sidecast.nowcaster_service",
    "protos": "sidecast.protos",
}
OTHER_FOLDERS = ("tests", "benchmarks", "examples", "docs", "deploy")
# Languages that the project is written in, prose included.
WRITTEN = {".py", ".cpp", ".h", ".proto", ".html", ".css", ".js", ".sh", ".Dockerfile", ".yml", ".toml", ".md"}
MAX_MODULES = 25
MAX_LINES = 400

CORE = {"assignments", "atomic_files", "errors", "horizon", "manifest", "mapped_memory", "scaling"}
PREDICTING = CORE | {"graphs", "predictors", "predictors.nino"}
# It offers what lies in the uppermost rooms, by names that are looked up when they are asked for.
FRONT_DOOR = "sidecast"
# Every room, and those below it: it may import these and itself.
ROOMS = {
    **{name: CORE - {name} for name in CORE},
    "graphs": CORE,
    "predictors": CORE | {"graphs"},
    "predictors.nino": CORE | {"graphs", "predictors"},
    "checkpoints": PREDICTING,
    "policies": CORE,
    "evaluation": PREDICTING | {"policies"},
    "metatraining": PREDICTING | {"evaluation"},
    "commands": PREDICTING | {"checkpoints", "evaluation", "metatraining"},
    "protos": set[str](),
    "nowcaster_service": PREDICTING | {"policies", "protos"},
    "nowcaster_service.commands": PREDICTING | {"checkpoints", "nowcaster_service", "protos"},
    "trainer.pipe": {"atomic_files", "errors"},
    "trainer.courier": {"atomic_files", "errors", "protos", "trainer.pipe"},
    "trainer.partitions": CORE | {"protos"},
    "trainer.settings": {"errors"},
    "trainer.hook": CORE | {"policies", "protos", "trainer.partitions", "trainer.pipe", "trainer.settings"},
    "trainer.integrations": PREDICTING | {"policies", "protos", "trainer.hook", "trainer.partitions", "trainer.pipe"},
    "trainer.job": CORE | {"trainer.settings"},
    "trainer.report": CORE | {"trainer.job"},
    "trainer.demo": CORE | {"trainer.job", "trainer.report"},
    "trainer.main": CORE | {"trainer.hook", "trainer.integrations", "trainer.job", FRONT_DOOR},
}

HOMES = {
    "grpc": {
        "sidecast.nowcaster_service.app",
        "sidecast.nowcaster_service.commands.connection",
        "sidecast.nowcaster_service.server",
        "sidecast.trainer.courier.client",
        "sidecast.trainer.courier.refusals",
    },
    # DeepSpeed's refusals are pydantic's; our own settings are read without it (ADR 18).
    "pydantic": {"sidecast.trainer.main"},
    "ray": {
        "sidecast.nowcaster_service.app",
        "sidecast.nowcaster_service.engine_pool",
        "sidecast.nowcaster_service.engines.ray_engines",
    },
}


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


@cache
def modules() -> dict[str, Path]:
    """Our modules by name; packages by the name of their folder."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            inside = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            found[".".join((package, *(part for part in inside if part != "__init__")))] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that a module imports anywhere in it, also in functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import, which says nothing of rooms"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in names}
    return frozenset(found)


def our_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name in modules()}


def outside_imports(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)} - {"sidecast"}


def room_of(module: str) -> str | None:
    """The room that a module lies in; None for the front door and for packages that only hold rooms."""
    inside = module.removeprefix("sidecast.")
    return max((room for room in ROOMS if f"{inside}.".startswith(f"{room}.")), key=len, default=None)


def modules_in(room: str) -> Iterator[str]:
    return (module for module in modules() if room_of(module) == room)


def reached_from(module: str) -> set[str]:
    """All of our modules that are loaded with one, with the packages around them."""
    reached: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name not in reached and name in modules():
            reached.add(name)
            parents = [name.rpartition(".")[0]] if "." in name else []
            left += [*parents, *(our_imports(name) if name != FRONT_DOOR else ())]
    return reached


def test_every_module_lies_in_a_room() -> None:
    homeless = [module for module in modules() if room_of(module) is None]
    assert [module for module in homeless if module != FRONT_DOOR and imports(module)] == []
    assert [room for room in ROOMS if not any(modules_in(room))] == []


def test_no_room_imports_one_above_it() -> None:
    wrong = []
    for module in modules():
        room = room_of(module)
        if room is not None:
            wrong += [
                f"{module} imports {name}"
                for name in sorted(our_imports(module))
                if (room_of(name) or name) not in {room, *ROOMS[room]}
            ]
    assert wrong == []


def test_the_rooms_are_in_an_order() -> None:
    assert "trainer.courier" not in ROOMS["trainer.hook"] | ROOMS["trainer.integrations"] | ROOMS["trainer.main"]
    # Errors are below all; the other parts of the core may use one another.
    rooms = {room: {below for below in belows if room not in CORE} for room, belows in ROOMS.items()}
    TopologicalSorter(rooms).prepare()


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {module: our_imports(module) for module in modules() if module != FRONT_DOOR}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from None


def test_the_pipe_needs_the_standard_library_only() -> None:
    wrong = {module: outside_imports(module) - sys.stdlib_module_names for module in modules_in("trainer.pipe")}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_a_courier_loads_neither_torch_nor_deepspeed() -> None:
    loaded = reached_from("sidecast.trainer.courier.__main__")
    assert "sidecast.trainer.courier.client" in loaded
    heavy = {"torch", "deepspeed", "transformers", "ray", "scipy", "safetensors"}
    assert {module for module in loaded if outside_imports(module) & heavy} == set()


def test_prediction_from_files_loads_neither_ray_nor_grpc() -> None:
    loaded = reached_from("sidecast.commands.predict") | reached_from("sidecast.commands.__main__")
    assert "sidecast.checkpoints.opening" in loaded
    assert {module for module in loaded if outside_imports(module) & {"ray", "grpc", "google", "deepspeed"}} == set()


def test_grpc_pydantic_and_ray_live_where_they_are_said_to() -> None:
    for package, homes in HOMES.items():
        found = {module for module in modules() if package in outside_imports(module)}
        assert {module for module in found if not is_generated(modules()[module])} == homes, package


def test_the_sides_and_deepspeed() -> None:
    wrong = []
    for module in modules():
        is_partition = room_of(module) == "trainer.partitions"
        internals = {"deepspeed.runtime", "deepspeed.utils"}
        touches = any(name == each or name.startswith(f"{each}.") for name in imports(module) for each in internals)
        if touches and not is_partition:
            wrong.append(f"{module} knows DeepSpeed's internals")
        if "deepspeed" in outside_imports(module) and not module.startswith("sidecast.trainer."):
            wrong.append(f"{module} imports deepspeed")
    assert wrong == []


def our_files(suffixes: Collection[str] = (".py",)) -> Iterator[Path]:
    """What somebody wrote, in files that end like this."""
    at_the_top = (path for path in REPOSITORY.iterdir() if path.is_file())
    inside = (path for folder in (*PACKAGES, *OTHER_FOLDERS) for path in (REPOSITORY / folder).rglob("*"))
    for path in (*at_the_top, *inside):
        if path.suffix in suffixes and not is_generated(path):
            yield path


def test_no_folder_is_crowded() -> None:
    sizes: dict[Path, int] = {}
    for path in our_files():
        sizes[path.parent] = sizes.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder): size for folder, size in sizes.items() if size > MAX_MODULES} == {}


def test_no_file_is_long() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in our_files(WRITTEN)}
    assert {path.suffix for path in our_files(WRITTEN)} == WRITTEN
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
